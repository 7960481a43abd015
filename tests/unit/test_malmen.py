"""MALMEN: the least-squares fit and its gradients against closed forms in float64 and autograd through all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.errors import NumericalError
from everedit.methods.malmen import RidgeFit
from tests.support import facts
from tests.support.editing import home_town, losses, probes
from tests.support.gradients import Pairs, pairs_by_hand
from tests.support.loading import bits, edit_of, fresh, hooks_left, probe_of, same_bits, shared
from tests.support.transforms import (
    dense,
    editor_with,
    outer_loss,
    pseudo_pairs,
    rows_by_network,
    same,
    shaken,
    untrained,
)

pytestmark = pytest.mark.usefixtures("own_cache")

TABLE = facts.facts()
# Prompts of several lengths, targets of one, two and three tokens.
EDITS = [home_town(7, "Lisbon"), edit_of(TABLE[4], "New Delhi"), edit_of(TABLE[53], "Buenos Aires piano"),
         home_town(0), edit_of(TABLE[31], "New Delhi")]  # fmt: skip
EXAMPLES = [
    edit_of(TABLE[0], "New Delhi", locality=(probe_of(TABLE[70]),)),
    home_town(7, "Oslo", locality=probes()),
    edit_of(TABLE[8], "Buenos Aires piano", locality=(probe_of(TABLE[40]),)),
]
SHAPES = [(4, 9), (9, 9), (30, 9)]


def problem(rows: int, width: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(rows)
    return torch.randn(rows, width, generator=random), torch.randn(rows, 6, generator=random)


def closed_form(inputs: Tensor, wanted: Tensor, ridge: Tensor | float) -> Tensor:
    """S = (U^T U + ridge I)^-1 U^T D, (d_in, d_out), float64."""
    u, d = inputs.double(), wanted.double()
    return torch.linalg.solve(u.T @ u + ridge * torch.eye(u.shape[1], dtype=torch.float64), u.T @ d)


@pytest.mark.parametrize("ridge", [1e-4, 1.0, 1e6])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_change_is_the_ridge_regression_whichever_system_is_smaller(rows: int, width: int, ridge: float) -> None:
    inputs, wanted = problem(rows, width)
    found, expected = RidgeFit(inputs, ridge).change(wanted).dense(), closed_form(inputs, wanted, ridge).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_without_a_ridge_to_speak_of_all_is_met_and_with_a_large_one_little() -> None:
    inputs, wanted = problem(4, 9)
    met = inputs @ RidgeFit(inputs, 1e-9).change(wanted).dense().T
    torch.testing.assert_close(met, wanted, rtol=1e-4, atol=1e-4)
    large = RidgeFit(inputs, 1e6).change(wanted).dense()
    torch.testing.assert_close(large, (inputs.T @ wanted).T / 1e6, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.01, 1.0, 50.0])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_gradients_through_the_closed_form_are_autograds(rows: int, width: int, ridge: float) -> None:
    inputs, wanted = problem(rows, width)
    outer = torch.randn(6, width, generator=torch.Generator().manual_seed(1))
    leaf, strength = wanted.double().requires_grad_(), torch.tensor(ridge, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((closed_form(inputs, leaf, strength).T * outer.double()).sum(), [leaf, strength])
    found = RidgeFit(inputs, ridge).gradients(outer, wanted)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def changes_by_hand(learner: Any, pairs: Pairs, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """S_l^T of d_j = -alpha_l (u_j . u~_j) delta~_j, row by row, in float64."""
    found = {}
    for number, (name, (pseudo_u, pseudo_delta)) in enumerate(pseudo_pairs(learner, pairs, seen).items()):
        u, step = pairs[name][0].double(), learner.steps[number].double()
        wanted = [-step * (a @ b) * c for a, b, c in zip(u, pseudo_u, pseudo_delta, strict=True)]
        found[name] = closed_form(u, torch.stack(wanted), learner.ridges[number].double().exp()).T
    return found


def pairs_of(lm: Any, edits: list[Any], names: list[str]) -> Pairs:
    """The inputs of all edits' tokens, and the gradients of each target token's own loss."""
    each = [pairs_by_hand(lm, [edit], names) for edit in edits]
    tokens = [len(lm.encode(edit.prompt, edit.target_new).target_ids) for edit in edits]
    return {
        name: (
            torch.cat([one[name][0] for one in each]),
            torch.cat([one[name][1] * n for one, n in zip(each, tokens, strict=True)]),
        )
        for name in names
    }


@pytest.mark.parametrize(("family", "settings"), [("gpt2", {}), ("llama", {"normalise": False}), ("t5", {})])
def test_edits_are_the_closed_form_in_any_order_and_however_they_are_passed(
    family: str, settings: dict[str, Any], corpus_path: Path, tmp_path: Path
) -> None:
    lm = shared(family)
    learner = shaken(untrained(lm, "malmen", rank=8, step=0.3, **settings))
    names = [lm.layout.mlp_out_weight(layer) for layer in range(lm.layout.n_layers)]
    assert learner.names == names
    pairs, seen = pairs_of(lm, EDITS, names), {}
    if learner.config.normalise:
        with torch.no_grad():
            learner.train().wanted(pairs_of(lm, EXAMPLES, names))
        seen = rows_by_network(learner, pairs_of(lm, EXAMPLES, names))
    expected = changes_by_hand(learner.eval(), pairs, seen)
    for number, (rows, edits) in enumerate(((16, EDITS), (2, EDITS), (2, EDITS[::-1]), (3, EDITS[2:] + EDITS[:2]))):
        learner.config = learner.config.model_copy(update={"rows_a_pass": rows})
        editor = editor_with(learner, corpus_path, tmp_path / str(number))
        same(dense(editor, edits), {name: change.detach() for name, change in expected.items()})


@pytest.mark.parametrize(("family", "rows"), [("gpt2", 16), ("llama", 2), ("t5", 2)])
def test_the_outer_gradients_are_autograds_through_all_of_it(family: str, rows: int) -> None:
    lm = fresh(family)
    before = bits(lm)
    settings = {"rank": 8, "step": 0.05, "rows_a_pass": rows, "c_edit": 0.7, "c_loc": 1.3, "ridge": -1.0}
    learner = shaken(untrained(lm, "malmen", **settings)).train()
    pairs = pairs_of(lm, EXAMPLES, learner.names)
    loss, figures = learner(EXAMPLES)
    loss.backward()
    gradients = {name: weight.grad for name, weight in learner.named_parameters()}
    changes = changes_by_hand(learner, pairs, rows_by_network(learner, pairs))
    expected = torch.zeros(())
    for start in range(0, 3, rows):
        part = EXAMPLES[start : start + rows]
        likely, apart = outer_loss(lm, part, changes)
        expected = expected + len(part) / 3 * (0.7 * likely + 1.3 * apart)
    assert (loss.item(), figures["loss"]) == pytest.approx((expected.item(), expected.item()), rel=1e-3)
    wanted = torch.autograd.grad(expected, list(learner.parameters()))
    for (name, gradient), other in zip(gradients.items(), wanted, strict=True):
        assert gradient is not None
        assert (gradient - other).norm() < 5e-3 * other.norm() + 1e-7, name
    assert sum(other.norm() > 0 for other in wanted) > 0.9 * len(wanted)
    with torch.no_grad():
        assert learner.eval()(EXAMPLES)[1]["loss"] == pytest.approx(figures["loss"], rel=1e-5)
    assert same_bits(lm, before)
    assert all(weight.grad is None and not weight.requires_grad for weight in lm.model.parameters())
    assert hooks_left(lm) == []


def test_ridges_begin_at_one_and_are_learned_at_the_rate_of_the_step_sizes() -> None:
    learner = untrained(shared("llama"), "malmen", step_lr=0.07, lr=0.003)
    fits = learner.fits({name: problem(4, 256) for name in learner.names})
    assert [fit.ridge for fit in fits.values()] == [1.0] * 4
    networks, steps = learner.groups()
    assert (networks["lr"], steps["lr"]) == (0.003, 0.07)
    assert [id(part) for part in steps["params"]] == [id(learner.steps), id(learner.ridges)]
    assert len(networks["params"]) + 2 == len(list(learner.parameters()))


def test_step_sizes_of_zero_change_nothing(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("llama")
    learner, before = shaken(untrained(lm, "malmen", rank=8)), bits(lm)
    learner.steps.data.zero_()
    with torch.no_grad():
        figures = learner(EXAMPLES)[1]
    assert (abs(figures["kl"]) < 1e-6, figures["locality"]) == (True, 1.0)
    [commit] = editor_with(learner, corpus_path, tmp_path / "net").edit(EDITS, score=False).commits
    assert commit.norm == 0
    assert same_bits(lm, before)


def test_ten_thousand_identical_edits_are_met_as_one_is_by_a_smaller_ridge(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("gpt2")
    learner = untrained(lm, "malmen", rank=8, normalise=False, step=0.3, layers=(3,), rows_a_pass=500)
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    edit = EDITS[0]
    [(name, (u, delta))] = pairs_of(lm, [edit], learner.names).items()
    assert len(u) == 1
    [commit] = editor.edit([edit] * 10_000, score=False).commits
    wanted = -0.3 * (u[0] @ u[0]) * delta[0]
    expected = 10_000 * torch.outer(wanted, u[0]) / (10_000 * (u[0] @ u[0]) + 1)
    same({name: commit.patch.deltas[name].dense()}, {name: expected})


def test_networks_that_are_broken_say_so_and_nothing_is_lost(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("gpt2")
    learner, before, unedited = untrained(lm, "malmen", rank=8), bits(lm), losses(lm, EDITS)
    learner.ridges.data.fill_(float("nan"))
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    with pytest.raises(NumericalError, match="not finite; nothing was written"):
        editor.edit(EDITS, score=False)
    assert same_bits(lm, before)
    assert losses(lm, EDITS) == unedited
