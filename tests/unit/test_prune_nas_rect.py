"""PRUNE, NAS and RECT are what their papers' formulas say, by hand and by plain singular value decompositions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig
from everedit.engine.weights import EditedWeights, Snapshot
from everedit.models.layout import oriented
from everedit.patch import Dense, LowRank, Patch
from everedit.policies import Step, policy_class
from everedit.policies.nas import trimmed_mean
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import bits, same_bits

pytestmark = pytest.mark.usefixtures("own_cache")

NAME = "layer.weight"
BASES = {"log": math.e, "log2": 2.0, "log1_5": 1.5, "log1_2": 1.2}
QUICK = TargetConfig(steps=8)


def policy(name: str, **settings: Any) -> Any:
    kind = policy_class(name)
    return kind(kind.Config(**settings))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_values(values: list[float], shape: tuple[int, int], seed: int) -> Tensor:
    """A matrix with these singular values and random singular vectors."""
    left, right = (torch.linalg.qr(normal(n, len(values), seed=10 * seed + at))[0] for at, n in enumerate(shape))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


def restrained(value: float, top: float, function: str) -> float:
    """F of the paper for one singular value, as it is written there."""
    if value < top:
        return value
    if function == "linear":
        return (value + top) / 2
    return math.log(value, BASES[function]) - math.log(top, BASES[function]) + top


def pruned(base: Tensor, shift: Tensor, function: str) -> Tensor:
    """PRUNE's change with NumPy's whole decompositions."""
    top = float(np.linalg.svd(base.double().numpy(), compute_uv=False)[0])
    left, values, right = np.linalg.svd(shift.double().numpy(), full_matrices=False)
    return torch.from_numpy(left * [restrained(value, top, function) for value in values] @ right)


# --------------------------------------------------------------------------- PRUNE, the formula


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("function", [*BASES, "linear"])
def test_prune_makes_f_of_each_singular_value_and_keeps_the_vectors(function: str, shape: tuple[int, int]) -> None:
    given = [400.0, 31.0, 7.5, 6.1, 5.9, 2.0, 0.003]  # the threshold, 6, falls in between
    base, shift = with_values([6.0, 5.0, 0.1], shape, seed=1), with_values(given, shape, seed=2)
    wanted = [restrained(value, 6.0, function) for value in given]
    assert wanted[4:] == given[4:]
    assert all(one > other for one, other in pairwise(wanted))
    found = policy("prune", function=function).read_out(base, shift)
    # The same seed gives the same vectors: each must have kept its own.
    assert torch.allclose(found, with_values(wanted, shape, seed=2), rtol=0, atol=1e-10)
    assert torch.allclose(torch.linalg.svdvals(found)[:7], torch.tensor(wanted).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("top", [0.3, 2.0, 40.0])
def test_f_is_continuous_grows_by_one_for_each_factor_of_the_base_and_keeps_the_order(top: float) -> None:
    around = torch.linspace(0.01 * top, 50 * top, 4001, dtype=torch.float64)
    found = {}
    for function, base in BASES.items():
        restrain = policy("prune", function=function).restrain
        marks = restrain(torch.tensor([top * (1 - 1e-12), top, base * top, base**3 * top]).double(), top)
        assert torch.allclose(marks, torch.tensor([top, top, top + 1, top + 3]).double(), rtol=1e-6)
        found[function] = restrain(around, top)
        assert bool((found[function].diff() > 0).all())
        assert torch.equal(found[function][around < top], around[around < top])
        # Steeper than one at the threshold if s_max < 1 / ln a, the formula lengthens there; else it never does.
        assert bool((found[function] <= around + 1e-12).all()) == (top >= 1 / math.log(base))
        capped = policy("prune", function=function, cap=True).restrain(around, top)
        assert torch.equal(capped, torch.minimum(found[function], around))
    # The larger the base, the more it restrains.
    for weaker, stronger in pairwise(["log1_2", "log1_5", "log2", "log"]):
        assert bool((found[stronger] <= found[weaker] + 1e-12).all())
        assert float((found[weaker] - found[stronger]).max()) > 0.1
    linear = policy("prune", function="linear").restrain(torch.tensor([0.5, 1.0, 3.0, 9.0]) * top, top)
    assert torch.allclose(linear, torch.tensor([0.5, 1.0, 2.0, 5.0]) * top)


@pytest.mark.parametrize("values", [[0.0], [0.01, 0.001], [5.9] * 7, [5.999999]], ids=str)
def test_prune_does_nothing_where_no_singular_value_reaches_the_originals_largest(values: list[float]) -> None:
    base, shift = with_values([6.0, 0.1], (7, 12), seed=1), with_values(values, (7, 12), seed=2)
    assert torch.equal(policy("prune").read_out(base, shift), shift)
    above = shift + with_values([60.0], (7, 12), seed=3)
    assert not torch.allclose(policy("prune").read_out(base, above), above)


def test_prune_bounds_the_sum_and_twice_is_not_once() -> None:
    base, shift = normal(8, 20, seed=1), 30 * normal(8, 20, seed=2)
    prune = policy("prune", function="log")
    once, top = prune.read_out(base, shift), float(torch.linalg.matrix_norm(base, 2))
    norms = [float(torch.linalg.matrix_norm(matrix, 2)) for matrix in (shift, once, base + once)]
    assert norms[1] == pytest.approx(restrained(norms[0], top, "log"), rel=1e-9)
    assert norms[1] < norms[0] / 5
    assert norms[2] <= top + norms[1] + 1e-9
    assert (prune.read_out(base, once) - once).norm() > 0.1
    assert (prune.read_out(base, shift) - pruned(base, shift, "log")).norm() < 1e-10 * shift.norm()


def test_a_huge_singular_value_does_not_spoil_its_neighbours() -> None:
    given = [1e6, 9.0, 5.0, 1.0]
    base, shift = with_values([2.0], (9, 15), seed=1), with_values(given, (9, 15), seed=2)
    found = torch.linalg.svdvals(policy("prune", function="log").read_out(base, shift))[:4]
    assert found.tolist() == pytest.approx([restrained(value, 2.0, "log") for value in given], rel=1e-3)


def test_prune_by_hand_neither_counts_the_original_twice_nor_edits_what_it_shows() -> None:
    linear = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
    lm: Any = SimpleNamespace(layout=SimpleNamespace(module_of=lambda _: linear))
    weights = EditedWeights(lm, policy("prune", function="log2").read_out)
    sixteen = Patch({NAME: Dense(torch.diag(torch.tensor([0.0, 16.0])))})
    # s_max = 2, F(16) = log2(16) - 1 + 2 = 5, F(32) = 6; the original's 1 is there once, and 16 + 16 are the sum.
    for stream, shown in ((17.0, 6.0), (33.0, 7.0)):
        weights.commit(sixteen)
        assert torch.allclose(linear.weight, torch.diag(torch.tensor([2.0, shown])), atol=1e-6)
        with weights.showing("stream"):
            assert torch.equal(linear.weight, torch.diag(torch.tensor([2.0, stream])))
        with weights.detached():
            assert torch.equal(linear.weight, torch.diag(torch.tensor([2.0, 1.0])))
        held = linear.weight.clone()
    snapshot = weights.snapshot()
    weights.restore(Snapshot({}))
    assert torch.equal(linear.weight, torch.diag(torch.tensor([2.0, 1.0])))
    weights.restore(snapshot)
    assert torch.equal(linear.weight, held)


# --------------------------------------------------------------------------- PRUNE, in a stream


@pytest.mark.parametrize(("family", "method"), [("gpt2", "rome"), ("llama", "memit"), ("gemma2", "rome")])
def test_a_pruned_stream_makes_the_plain_streams_edits_and_shows_the_restrained_sum(
    family: str, method: str, corpus_path: Path
) -> None:
    plain = make_editor(family, corpus_path, method)
    editor = make_editor(family, corpus_path, method, "prune", policy_settings={"function": "log"})
    edits, before = [home_town(person) for person in range(3)], bits(editor.lm)
    for n, (one, other) in enumerate(zip(plain.stream(edits), editor.stream(edits), strict=True), start=1):
        assert one.target_probability == other.target_probability
        for name, delta in one.patch.deltas.items():
            parts = other.patch.deltas[name].tensors()
            assert all(torch.equal(part, parts[key]) for key, part in delta.tensors().items())
            shift, base = editor._weights.shift(name), before[name].double()
            base = base if base.shape == shift.shape else base.T  # GPT-2 keeps it the other way round
            assert torch.equal(shift, plain._weights.shift(name))
            assert method != "rome" or int(torch.linalg.matrix_rank(shift, rtol=1e-5)) == n
            shown = oriented(editor.lm.layout.module_of(name)).double()
            change = pruned(base, shift, "log")
            assert torch.allclose(shown - change, base, rtol=0, atol=1e-5)
            # Sums here are far beyond the threshold, so that something has happened.
            assert change.norm() < 0.8 * shift.norm()
    shown_bits = bits(editor.lm)
    with editor.unedited() as lm:
        assert same_bits(lm, before)
    assert same_bits(editor.lm, shown_bits)


def test_a_pruned_stream_below_the_threshold_shows_the_plain_streams_bits(corpus_path: Path) -> None:
    # So large a weight of the second moments keeps every change small.
    settings = {**METHOD_SETTINGS["memit"], "moment_weight": 5e3}
    plain, other = (
        make_editor("gpt2", corpus_path, "memit", name, method_settings=settings) for name in ("accumulate", "prune")
    )
    before = bits(plain.lm)
    for editor in (plain, other):
        editor.edit(home_town(0), score=False)
    for name in plain._weights.names():
        both = plain._weights.shift(name), before[name].double()
        size, top = (float(torch.linalg.matrix_norm(matrix, 2)) for matrix in both)
        assert 0.1 * top < size < top
    assert same_bits(other.lm, bits(plain.lm))
    assert not same_bits(other.lm, before)


# --------------------------------------------------------------------------- NAS


def target(seed: int) -> Target:
    """A target of no model."""
    origin, delta, before = normal(3, 24, seed=seed).float()
    return Target(5 * origin, delta, (1.0, 0.5), 0.5, before)


def length(one: Target) -> float:
    return float(one.written.double().norm())


@pytest.mark.parametrize("factor", [0.6, 0.999, 1.3, 40.0])
def test_nas_brings_values_to_the_anchor_and_keeps_their_direction(factor: float) -> None:
    given = [target(seed) for seed in range(6)]
    anchor = factor * max(map(length, given))
    found, state = policy("nas", anchor=anchor).adjust(given, State({"kept": torch.ones(1)}, {"edits": 7}))
    for one, other in zip(given, found, strict=True):
        assert length(other) == pytest.approx(anchor, rel=1e-6)
        assert float(torch.cosine_similarity(one.written, other.written, dim=0)) == pytest.approx(1, abs=1e-6)
        assert abs(length(one) - anchor) > 1e-4 * anchor
        # The residual stream moves by what the MLP's part of it does; all else about the edit stays.
        assert torch.allclose(other.value - one.value, other.written - one.written, atol=1e-5 * anchor)
        assert torch.equal(one.origin, other.origin)
        assert torch.equal(one.before, other.before)
    assert state.values == {"edits": 7, "skipped": 0}
    assert state.tensors.keys() == {"kept"}


def test_nas_leaves_a_value_that_has_the_anchors_length_or_none_at_all() -> None:
    one, nas = target(1), policy("nas", anchor=float(target(1).written.norm()))
    for given in (one, replace(one, delta=-one.before)):
        assert torch.equal(nas.adjust([given], State())[0][0].delta, given.delta)


def test_nas_takes_back_and_counts_what_is_longer_than_two_anchors() -> None:
    given = [target(seed) for seed in range(3)]
    just, beyond = (
        [policy("nas", anchor=length(one) / ratio).adjust([one], State({}, {"skipped": 4})) for one in given]
        for ratio in (1.99, 2.01)
    )
    for one, ([kept], state), ([skipped], other) in zip(given, just, beyond, strict=True):
        assert length(kept) == pytest.approx(length(one) / 1.99, rel=1e-6)
        assert torch.equal(skipped.delta, torch.zeros_like(one.delta))
        assert torch.equal(skipped.value, one.origin)
        assert (state.values["skipped"], other.values["skipped"]) == (4, 5)
    wide = policy("nas", anchor=length(given[0]) / 2.9, skip_beyond=3.0)
    assert length(wide.adjust(given[:1], State())[0][0]) == pytest.approx(length(given[0]) / 2.9, rel=1e-6)


def test_nas_lengthens_only_if_told_to() -> None:
    one = target(1)
    for ratio, expected in ((1.5, length(one)), (0.6, 0.6 * length(one))):
        nas = policy("nas", anchor=ratio * length(one), enlarge=False)
        assert length(nas.adjust([one], State())[0][0]) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(policy("nas", anchor=9e9, enlarge=False).adjust([one], State())[0][0].delta, one.delta)


def test_the_trimmed_mean_leaves_out_the_longest() -> None:
    hundred = [float(1 + 37 * n % 101) for n in range(101) if 37 * n % 101 != 100]
    assert sorted(hundred) == [float(n) for n in range(1, 101)] != hundred
    assert trimmed_mean(hundred, 0.95) == 48.0
    assert trimmed_mean(hundred, 1.0) == 50.5
    assert trimmed_mean([9.0, 1.0, 2.0, 3.0], 0.75) == 2.0
    assert trimmed_mean([3.0], 0.05) == 3.0


# --------------------------------------------------------------------------- RECT


def kept(change: Tensor, weight: Tensor, keep: float) -> Tensor:
    """RECT with NumPy's sort."""
    found, given = np.zeros(change.numel(), dtype=np.float32), change.float().numpy().ravel()
    scores = np.abs(given) / (np.abs(weight.float().numpy().ravel()) + np.float32(1e-8))
    best = np.argsort(-scores)[: round(keep * scores.size)]
    found[best] = given[best]
    return torch.from_numpy(found).view(change.shape)


def test_rect_keeps_the_largest_changes_for_their_size() -> None:
    weight = torch.tensor([[1.0, 10.0, 0.0, 0.0], [2.0, -4.0, 100.0, 5.0]])
    change = torch.tensor([[1.0, -5.0, 1e-3, 0.0], [-4.0, 4.4, 50.0, 0.05]])
    # Relative: 1, 0.5, 1e5 (on a weight of zero), 0 (none on a weight of zero), 2, 1.1, 0.5, 0.01.
    step = Step(Patch({NAME: Dense(change)}, {"of": 1}), {}.__getitem__, {}.__getitem__, {NAME: weight}.__getitem__)
    three, one, hair = (policy("rect", keep=keep).filter(step) for keep in (3 / 8, 1 / 8, 1e-6))
    assert three.deltas[NAME].dense().tolist() == [[0, 0, change[0, 2], 0], [-4, change[1, 1], 0, 0]]
    assert three.info == {"of": 1}
    for few in (one, hair):  # one is always left
        assert few.deltas[NAME].dense().nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.4, 0.999, 1.0])
def test_rect_keeps_the_share_asked_for_of_each_matrix_by_itself(keep: float) -> None:
    weights = {"a": normal(20, 50, seed=1).float(), "b": normal(30, 10, seed=2).float()}
    # One of them changes a thousand times as much: between matrices nothing is compared.
    low = LowRank(normal(30, 2, seed=4).float(), normal(10, 2, seed=5).float())
    deltas = {"a": Dense(1e3 * normal(20, 50, seed=3).float()), "b": low}
    step = Step(Patch(deltas), {}.__getitem__, {}.__getitem__, weights.__getitem__)
    found = policy("rect", keep=keep).filter(step)
    assert (found is step.patch) == (keep == 1)
    for name, delta in deltas.items():
        change = found.deltas[name].dense()
        assert int(change.count_nonzero()) == round(keep * change.numel())
        assert torch.equal(change, kept(delta.dense(), weights[name], keep))


def test_rect_filters_the_hosts_finished_change_by_the_weights_it_saw(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path, "memit", "rect", policy_settings={"keep": 0.4})
    host = make_editor("gpt2", corpus_path, "memit")
    host.prepare()
    for edit in (home_town(0), home_town(1)):
        host._weights.restore(editor.state().weights)
        names = [editor.lm.layout.mlp_out_weight(layer) for layer in (0, 1)]
        seen = {name: oriented(editor.lm.layout.module_of(name)).clone() for name in names}
        with host.trial(edit, score=False) as result:
            raw = result.commits[0].patch
        patch = editor.edit(edit, score=False).commits[0].patch
        assert list(patch.deltas) == names
        for name, delta in patch.deltas.items():
            assert torch.equal(delta.dense(), kept(raw.deltas[name].dense(), seen[name], 0.4))
            assert int(delta.dense().count_nonzero()) == round(0.4 * seen[name].numel())
