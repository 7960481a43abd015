"""SimIE is the ridge regression that its paper derives, in whichever form it is computed; accumulation adds up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.editor import Editor
from everedit.engine.settings import validated
from everedit.engine.state import State
from everedit.errors import EditError, UnknownName
from everedit.experiments.folder import RunFolder
from everedit.patch import Dense, LowRank, Patch
from everedit.policies import Policy, Step, policy_class, policy_names
from everedit.policies._base import STAGES
from everedit.policies.simie import SimieConfig
from tests.support.editing import home_town, make_editor
from tests.support.loading import fresh

D_OUT, D_IN = 5, 12
NAME = "layer.weight"
Editing = Callable[[Tensor, int], Tensor]


def simie(**settings: Any) -> Policy:
    kind = policy_class("simie")
    return kind(SimieConfig(**settings))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Stream:
    """A policy applied to one matrix, with a method that is any function of the matrix it sees and the step."""

    policy: Policy
    method: Editing
    keys: list[Tensor]
    base: Tensor = field(default_factory=lambda: normal(D_OUT, D_IN, seed=99))
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        self.now = self.base.clone()

    def run(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Make the edits from ``start`` to ``stop`` and return the shift S = W_now - W_base."""
        for index, keys in list(enumerate(self.keys))[start:stop]:
            seen = self.base if self.policy.edits_from == "base" else self.now
            raw, shift = self.method(seen, index), self.now - self.base
            step = Step(Patch({NAME: Dense(raw)}), {NAME: keys}.__getitem__, {NAME: shift}.__getitem__, {}.__getitem__)
            change, self.state = self.policy.combine(step, self.state)
            self.now = self.now + change.deltas[NAME].dense()
        return self.now - self.base


def ridge(effects: list[Tensor], keys: list[Tensor], lam: float) -> Tensor:
    """The closed form B K^T (lambda I + K K^T)^-1, with the plain inverse."""
    b, k = torch.cat(effects, dim=1), torch.cat(keys, dim=1)
    return b @ k.T @ torch.linalg.inv(lam * torch.eye(len(k), dtype=k.dtype) + k @ k.T)


def anything(_: Tensor, index: int) -> Tensor:
    return normal(D_OUT, D_IN, seed=1000 + index)


def toward(keys: list[Tensor], values: list[Tensor]) -> Editing:
    """The toy editor whose value does not depend on where it starts: Delta W = (v - W k) k^T / ||k||^2."""

    def method(weight: Tensor, index: int) -> Tensor:
        k, v = keys[index], values[index]
        return (v - weight @ k) @ k.T / (k.T @ k)

    return method


# --------------------------------------------------------------------------- the regression


@pytest.mark.parametrize("solver", ["cholesky", "woodbury"])
@pytest.mark.parametrize("lam", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("counts", [[1] * 6, [3, 1, 5, 2], [20, 20]])
def test_from_the_base_it_is_the_batch_ridge_regression(counts: list[int], lam: float, solver: str) -> None:
    keys = [normal(D_IN, n, seed=index) for index, n in enumerate(counts)]
    stream = Stream(simie(lam=lam, start="base", solver=solver), anything, keys)
    expected = ridge([anything(stream.base, i) @ k for i, k in enumerate(keys)], keys, lam)
    assert expected.norm() > 1e-3
    assert torch.allclose(stream.run(), expected, rtol=0, atol=1e-11 * float(expected.norm()))


def test_from_the_base_the_order_of_edits_plays_no_part() -> None:
    keys = [normal(D_IN, 2, seed=index) for index in range(5)]
    forth = Stream(simie(start="base"), anything, keys).run()
    back = Stream(simie(start="base"), lambda weight, i: anything(weight, 4 - i), keys[::-1]).run()
    assert torch.allclose(forth, back, atol=1e-12)


@pytest.mark.parametrize("lam", [1e-6, 0.5, 7.0])
def test_orthonormal_keys_get_each_single_edit_shrunk_by_one_plus_lambda(lam: float) -> None:
    keys = [column[:, None] for column in torch.linalg.qr(normal(D_IN, D_IN, seed=1))[0].T]
    stream = Stream(simie(lam=lam), anything, keys)
    shift = stream.run()
    for index, key in enumerate(keys):
        assert torch.allclose(shift @ key, anything(stream.base, index) @ key / (1 + lam), atol=1e-7)


@pytest.mark.parametrize("lam", [1e-3, 10.0])
def test_both_starts_agree_where_the_editor_is_key_value_invariant(lam: float) -> None:
    keys = [normal(D_IN, 1, seed=index) for index in range(8)]
    values = [normal(D_OUT, 1, seed=50 + index) for index in range(8)]
    shifts = [Stream(simie(lam=lam, start=start), toward(keys, values), keys).run() for start in ("base", "current")]
    assert torch.allclose(*shifts, atol=1e-11)
    # The order matters to no one, but the editor does: an editor that is not invariant gives two results.
    other = [Stream(simie(lam=lam, start=start), anything, keys).run() for start in ("base", "current")]
    assert (other[0] - other[1]).norm() > 0.1


@pytest.mark.parametrize("start", ["base", "current"])
def test_a_small_lambda_gives_the_ideal_editor(start: str) -> None:
    keys = [normal(D_IN, 1, seed=index) for index in range(8)]
    values = [normal(D_OUT, 1, seed=50 + index) for index in range(8)]
    stream = Stream(simie(lam=1e-9, start=start), toward(keys, values), keys)
    shift = stream.run()
    for key, value in zip(keys, values, strict=True):
        assert torch.allclose(stream.now @ key, value, atol=1e-6)
    # Plain accumulation of the same edits has lost the first ones.
    plain = Stream(policy_class("accumulate")(SimieConfig.model_construct()), toward(keys, values), keys)
    plain.run()
    assert (plain.now @ keys[0] - values[0]).norm() > 0.1
    joined = torch.cat(keys, dim=1)
    effects = torch.cat(values, dim=1) - stream.base @ joined
    assert torch.allclose(shift, effects @ torch.linalg.pinv(joined), atol=1e-5)


def test_a_large_lambda_leaves_the_model_alone() -> None:
    keys = [normal(D_IN, 2, seed=index) for index in range(4)]
    shift = Stream(simie(lam=1e12), anything, keys).run()
    assert 0 < shift.norm() < 1e-9


def test_one_edit_with_a_large_key_is_the_editors_own_on_that_key() -> None:
    keys = [100 * normal(D_IN, 1, seed=3)]
    shift = Stream(simie(lam=1e-3), anything, keys).run()
    assert torch.allclose(shift @ keys[0], anything(shift, 0) @ keys[0], rtol=1e-6)
    # Other directions are not touched, whatever the editor did to them.
    away = normal(D_IN, 1, seed=4)
    away = away - keys[0] * float(keys[0].T @ away) / float(keys[0].T @ keys[0])
    assert (shift @ away).norm() < 1e-6 < (shift @ keys[0]).norm()


@pytest.mark.parametrize("start", ["base", "current"])
@pytest.mark.parametrize("lam", [0.1, 100.0])
def test_woodbury_agrees_with_cholesky_over_a_long_stream(lam: float, start: str) -> None:
    keys = [normal(D_IN, 1 + index % 3, seed=index) for index in range(230)]
    shifts = [
        Stream(simie(lam=lam, start=start, solver=solver), anything, keys).run() for solver in ("cholesky", "woodbury")
    ]
    assert shifts[0].norm() > 0.1
    assert (shifts[0] - shifts[1]).norm() < 1e-9 * shifts[0].norm()


def test_woodburys_inverse_is_made_anew_every_hundred_edits() -> None:
    keys = [normal(D_IN, 1, seed=index) for index in range(100)]
    stream = Stream(simie(solver="woodbury"), anything, keys)
    stream.run(stop=98)
    spoilt = dict(stream.state.tensors)
    spoilt[f"inverse|{NAME}"] = spoilt[f"inverse|{NAME}"] * 1.5
    stream.state = State(spoilt, stream.state.values)
    stream.run(start=98)
    eye = torch.eye(D_IN, dtype=torch.float64)
    assert stream.state.values == {"edits": 100}
    product = stream.state.tensors[f"inverse|{NAME}"] @ stream.state.tensors[f"P|{NAME}"]
    assert torch.allclose(product, eye, atol=1e-10)


# --------------------------------------------------------------------------- state


@pytest.mark.parametrize("solver", ["cholesky", "woodbury"])
def test_a_state_read_back_from_disk_goes_on_bit_for_bit(solver: str, tmp_path: Path) -> None:
    keys = [normal(D_IN, 2, seed=index) for index in range(6)]
    whole = Stream(simie(solver=solver), anything, keys)
    whole.run(stop=3)
    held, weights = whole.state, whole.now.clone()
    folder = RunFolder(tmp_path)
    editor = Editor(fresh("gpt2"))
    folder.save_state(type(editor.state())(editor.state().weights, State(), held, {}), 3)
    other = Stream(simie(solver=solver), anything, keys)
    other.state, other.now = folder.load_state(torch.get_default_device())[0].policy, weights
    assert other.state.values == {"edits": 3}
    assert torch.equal(other.run(start=3), whole.run(start=3))


@pytest.mark.parametrize("solver", ["cholesky", "woodbury"])
def test_a_step_leaves_the_state_it_was_given(solver: str) -> None:
    keys = [normal(D_IN, 2, seed=index) for index in range(3)]
    stream = Stream(simie(solver=solver), anything, keys)
    stream.run(stop=1)
    given = stream.state
    copies = {name: tensor.clone() for name, tensor in given.tensors.items()}
    stream.run(start=1)
    assert stream.state is not given
    assert given.values == {"edits": 1}
    assert given.tensors.keys() == copies.keys() >= {f"P|{NAME}"}
    assert all(torch.equal(given.tensors[name], copy) for name, copy in copies.items())


def test_p_is_kept_for_each_weight_by_itself() -> None:
    first, second = normal(D_IN, 2, seed=1), normal(4, 3, seed=2)
    patch = Patch({"a": Dense(normal(D_OUT, D_IN, seed=3)), "b": Dense(normal(7, 4, seed=4))}, {"from": "here"})
    step = Step(patch, {"a": first, "b": second}.__getitem__, {}.__getitem__, {}.__getitem__)
    change, state = simie(lam=2.0).combine(step, State())
    for name, keys in (("a", first), ("b", second)):
        assert torch.allclose(state.tensors[f"P|{name}"], 2 * torch.eye(len(keys)).double() + keys @ keys.T)
        raw = patch.deltas[name].dense()
        assert torch.allclose(change.deltas[name].dense(), ridge([raw @ keys], [keys], 2.0))
        assert isinstance(change.deltas[name], LowRank)
    assert change.rank() == 3
    assert change.info == {"from": "here"}


# --------------------------------------------------------------------------- in an editor


def input_of(module: torch.nn.Module, model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The module's input on one text, (d_in, tokens)."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    model(ids)
    handle.remove()
    return seen[0].double().T


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("family", "method"), [("gpt2", "rome"), ("llama", "memit")])
def test_an_editors_stream_is_the_ridge_regression_of_its_single_edits(
    family: str, method: str, corpus_path: Path
) -> None:
    """Conv1D's transposed weights and Linear's alike; keys and single edits are found here without the policy."""
    edits, lam = [home_town(person) for person in range(3)], 0.3
    single = make_editor(family, corpus_path, method)
    names = [single.lm.layout.mlp_out_weight(layer) for layer in single.method.layers()]
    raws: list[Patch] = []
    keys: list[dict[str, Tensor]] = []
    for edit in edits:
        ids = single.lm.tokenizer(f"{edit.prompt} {edit.target_new}", return_tensors="pt").input_ids
        keys.append({name: input_of(single.lm.layout.module_of(name), single.lm.model, ids) for name in names})
        with single.trial(edit, score=False) as result:
            raws.append(result.commits[0].patch)
    editor = make_editor(family, corpus_path, method, "simie", policy_settings={"lam": lam, "start": "base"})
    for edit in edits:
        editor.edit(edit, score=False)
    for name in names:
        effects = [raw.deltas[name].dense().double() @ key[name] for raw, key in zip(raws, keys, strict=True)]
        expected = ridge(effects, [key[name] for key in keys], lam)
        found = editor._weights.shift(name)
        assert found.shape == expected.shape == (64, 256)
        assert (found - expected).norm() < 2e-3 * expected.norm()
        assert editor.state().policy.tensors[f"P|{name}"].shape == (256, 256)


@pytest.mark.usefixtures("own_cache")
def test_accumulation_is_the_sum_of_the_changes(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path, "rome", "accumulate")
    commits = list(editor.stream([home_town(person) for person in range(4)]))
    name = editor.lm.layout.mlp_out_weight(1)
    total = torch.stack([commit.patch.deltas[name].dense().double() for commit in commits]).sum(0)
    assert total.norm() > 1
    assert torch.allclose(editor._weights.shift(name), total, atol=1e-5)
    assert editor.state().policy == State()


def test_accumulation_passes_the_patch_itself() -> None:
    patch, state = Patch({NAME: Dense(normal(2, 3, seed=0))}), State(values={"kept": 1})
    policy = policy_class("accumulate")(policy_class("accumulate").Config())
    assert policy.edits_from == "current"
    assert policy.combine(Step(patch, {}.__getitem__, {}.__getitem__, {}.__getitem__), state) == (patch, state)


# --------------------------------------------------------------------------- the registry


def test_the_registry_lists_files_and_suggests_near_names() -> None:
    assert {"accumulate", "simie"} <= set(policy_names())
    for name in policy_names():
        kind = policy_class(name)
        assert kind.name == name
        assert kind.title
        assert kind.traits()["needs"] in ("", "weights", "values")
        assert kind.traits()["stage"] in STAGES
    with pytest.raises(UnknownName, match="did you mean accumulate"):
        policy_class("acumulate")


@pytest.mark.parametrize("bad", [{"lam": 0}, {"lam": -1.0}, {"start": "middle"}, {"solver": "lu"}, {"gamma": 1}])
def test_bad_settings_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(EditError, match=next(iter(bad))):
        validated(SimieConfig, bad, "policy simie")
