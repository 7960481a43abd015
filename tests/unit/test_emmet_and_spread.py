"""EMMET on one matrix, and AlphaEdit, RLSEdit and EMMET on trained models: what is written, what is carried on and what
is saved, against the printed equations on a copy that is read one text at a time and really written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import eigvalsh, inv

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import SecondMoment
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import NumericalError
from everedit.experiments.folder import RunFolder
from everedit.methods import method_class
from everedit.models.layout import oriented
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared

D, H = 16, 5
FAMILIES = ["gpt2", "llama", "gptj"]  # transposed weights, a gated MLP, a parallel block


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm().clamp_min(1e-300))


# --------------------------------------------------------------------------- EMMET on one matrix

_VECTORS = normal(0, D, 4 * D) * torch.linspace(0.5, 2.0, D, dtype=torch.float64)[:, None]
MOMENT = _VECTORS @ _VECTORS.T / (4 * D)


def solved(name: str, keys: Tensor, residual: Tensor, **settings: Any) -> Tensor:
    """The change that a method makes of one batch, with C exactly MOMENT."""
    kind: Any = method_class(name)
    held, tensors = SecondMoment(0, MOMENT, 1000, ridge=0.0), dict[str, Tensor]()
    bench = SimpleNamespace(moments=SimpleNamespace(get=lambda layers: dict.fromkeys(layers, held)))
    update = kind(kind.Config(layers=(0,), **settings)).solve(bench, 0, keys, residual, tensors)
    assert tensors == {}
    return update.dense()


def emmet(keys: Tensor, residual: Tensor, *, ridge: float = 0.1, scale: float = 1.0, **more: Any) -> Tensor:
    return solved("emmet", keys, residual, ridge=ridge, moment_scale=scale, **more)


@pytest.mark.parametrize(("scale", "ridge"), [(1.0, 0.1), (1000.0, 0.1), (1e5, 0.1), (0.3, 2.0)])
@pytest.mark.parametrize("n", [2, 7, 30])
def test_emmet_is_its_closed_form_and_memit_weighted_by_scale_times_ridge(n: int, scale: float, ridge: float) -> None:
    keys, residual, inverse = normal(1, D, n), normal(2, H, n), inv(scale * MOMENT)
    change = emmet(keys, residual, ridge=ridge, scale=scale)
    assert close(change, residual @ inv(keys.T @ inverse @ keys + ridge * eye(n)) @ keys.T @ inverse, 1e-10)
    assert close(change, residual @ keys.T @ inv(scale * ridge * MOMENT + keys @ keys.T), 1e-10)
    assert close(change, solved("memit", keys, residual, moment_weight=scale * ridge), 1e-10)


@pytest.mark.parametrize("n", [1, 4, D])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_emmet_without_a_ridge_meets_every_value_at_the_least_cost(n: int, scale: float) -> None:
    keys, residual = normal(1, D, n), normal(2, H, n)
    change = emmet(keys, residual, ridge=0.0, scale=scale)
    assert close(change @ keys, residual, 1e-10)
    # Of all changes that map K to R the one with the least ||Delta C^1/2||, whatever the scale of C.
    half = torch.linalg.cholesky(MOMENT)
    assert close(change, residual @ torch.linalg.pinv(inv(half) @ keys) @ inv(half), 1e-9)


def test_emmets_ridge_counts_for_one_edit_only_where_asked() -> None:
    key, residual = normal(1, D, 1), normal(2, H, 1)
    direction = inv(MOMENT) @ key
    inner = float(key.T @ direction)
    # With none it is ROME's change with one key in both places.
    assert close(emmet(key, residual, ridge=0.4), residual @ direction.T / inner, 1e-12)
    asked = emmet(key, residual, ridge=0.4, ridge_for_one=True)
    assert close(asked, residual @ direction.T / (inner + 0.4), 1e-12)


def same_key_twice(n: int, seed: int) -> tuple[Tensor, Tensor]:
    keys = normal(seed, D, n)
    keys[:, -1] = keys[:, 0]
    return keys, normal(seed + 1, H, n)


@pytest.mark.parametrize("n", [2, 5])
def test_without_a_ridge_two_values_for_one_key_are_refused(n: int) -> None:
    """Rounding leaves such a system now just below, now just above singular; its solution is noise all the same."""
    silent = []
    for seed in range(0, 40, 2):
        try:
            emmet(*same_key_twice(n, seed), ridge=0.0)
            silent.append(seed)
        except NumericalError:
            pass
    assert silent == []


def test_with_a_ridge_two_values_for_one_key_are_averaged() -> None:
    keys, residual = same_key_twice(4, 0)
    middle = residual.clone()
    middle[:, 0] = middle[:, -1] = (residual[:, 0] + residual[:, -1]) / 2
    assert close(emmet(keys, residual), emmet(keys, middle), 1e-10)
    assert not close(emmet(keys, residual), emmet(keys[:, :-1], residual[:, :-1]), 0.05)


# --------------------------------------------------------------------------- trained models, by hand

FIRST, SECOND, LAST = [[home_town(person) for person in people] for people in ((0, 10, 20), (5, 15), (3,))]
WIDTH = 256  # of the tiny models' keys
# Few steps, since any value will do, and weights about as large as a batch, so that the history shows.
_TARGET = {"target": {**METHOD_SETTINGS["memit"]["target"], "steps": 6}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "alphaedit": ("alphaedit", {"threshold": 0.05, "ridge": 1.0}),
    "alphaedit-": ("alphaedit", {"threshold": 0.05, "ridge": 1.0, "keep_previous": False}),
    "rlsedit": ("rlsedit", {"moment_weight": 3.0, "lam": 0.5, "mu": 0.8}),
    "emmet": ("emmet", {"ridge": 0.5, "moment_scale": 3.0}),
}


def haired(matrix: Tensor, ridge: float) -> Tensor:
    """The matrix with the hair's breadth of ridge that a short text needs."""
    return matrix + ridge * matrix.diagonal().mean() * eye(len(matrix))


def projector(moment: Tensor, threshold: float) -> Tensor:
    left, sizes, _ = torch.linalg.svd(moment)
    null = left[:, sizes < threshold]
    assert 0 < null.shape[1] < len(moment)
    return null @ null.T


def printed(name: str, c: Any, moment: SecondMoment, k: Tensor, r: Tensor, previous: Tensor) -> Tensor:
    """One layer's change as the method's paper prints it, with ``previous`` the sum over earlier keys."""
    matrix, n = moment.matrix, k.shape[1]
    if name == "emmet":
        inverse = inv(c.moment_scale * haired(matrix, moment.ridge))
        return r @ inv(k.T @ inverse @ k + (c.ridge if n > 1 else 0) * eye(n)) @ k.T @ inverse
    if name == "rlsedit":
        anchor = c.lam**2 * eye(len(k)) + c.mu**2 * c.moment_weight * matrix
        return r @ k.T @ inv(haired(anchor, moment.ridge) + previous + k @ k.T)
    p = projector(matrix, c.threshold)
    kept = previous @ p if c.keep_previous else 0
    return r @ k.T @ p @ inv(kept + k @ k.T @ p + c.ridge * eye(len(k)))


class ByHand:
    """The same stream on a copy of the model, with whole forwards, weights that are written, and sums of k k^T."""

    def __init__(self, family: str, editor: Editor) -> None:
        self.lm, self.editor = fresh(family), editor
        self.layers: tuple[int, ...] = editor.method.layers()
        self.prefixes = editor.method.prefixes(editor.bench)
        self.previous = {layer: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for layer in self.layers}

    def read(self, edit: Edit, layer: int, prefix: str = "") -> tuple[Tensor, Tensor]:
        """The layer's key and the last edited block's output, at the last token of prefix and prompt."""
        seen: dict[str, Tensor] = {}

        def key_hook(_: Any, args: Any) -> None:
            seen["key"] = args[0].reshape(-1, args[0].shape[-1])[-1]

        def state_hook(_: Any, __: Any, output: Any) -> None:
            seen["state"] = (output[0] if isinstance(output, tuple) else output)[0, -1]

        layout = self.lm.layout
        handles = [
            layout.mlp_out(layer).register_forward_pre_hook(key_hook),
            layout.block(self.layers[-1]).register_forward_hook(state_hook),
        ]
        self.lm.model(self.lm.tokenizer(prefix + edit.prompt, return_tensors="pt").input_ids)
        for handle in handles:
            handle.remove()
        return seen["key"].detach().double(), seen["state"].detach().double()

    def keys(self, edits: Sequence[Edit], layer: int) -> Tensor:
        columns = []
        for edit in edits:
            bare, *others = [self.read(edit, layer, prefix)[0] for prefix in self.prefixes]
            columns.append(bare / 2 + torch.stack(others).mean(0) / 2)
        return torch.stack(columns, dim=1)

    def edit(self, edits: Sequence[Edit], targets: Sequence[Target]) -> dict[int, Tensor]:
        """Make one batch and return the changes by layer; its keys are added up when all layers are written."""
        wanted, changes = torch.stack([target.value.double() for target in targets], dim=1), {}
        for index, layer in enumerate(self.layers):
            state = torch.stack([self.read(edit, layer)[1] for edit in edits], dim=1)
            residual = (wanted - state) / (len(self.layers) - index)
            moment, method = self.editor.bench.moments.get([layer])[layer], self.editor.method
            known = (moment, self.keys(edits, layer), residual, self.previous[layer])
            changes[layer] = printed(method.name, method.config, *known)
            weight = oriented(self.lm.layout.mlp_out(layer))
            weight.copy_(weight.double() + changes[layer])
        for layer in self.layers:
            keys = self.keys(edits, layer)
            self.previous[layer] += keys @ keys.T
        return changes


def editor_of(family: str, corpus: Path, variant: str) -> Editor:
    name, settings = VARIANTS[variant]
    chosen = {**METHOD_SETTINGS[name], **_TARGET, **settings}
    editor = make_editor(family, corpus, name, method_settings=chosen)
    editor.prepare()
    return editor


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_batches_are_the_printed_equations_layer_after_layer(variant: str, family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, variant)
    method, names = editor.method, editor.lm.layout.mlp_out_weight
    plain, state = ByHand(family, editor), State()
    for batch in (FIRST, SECOND):
        targets, before = method.targets(editor.bench, batch), bits(editor.lm)
        given = {name: tensor.clone() for name, tensor in state.tensors.items()}
        patch, after = method.fit(editor.bench, batch, state, targets)
        # The model and the state that it was given stay as they were.
        assert same_bits(editor.lm, before)
        assert hooks_left(editor.lm) == []
        assert state.tensors.keys() == given.keys()
        assert all(torch.equal(state.tensors[name], tensor) for name, tensor in given.items())
        changes = plain.edit(batch, targets)
        assert list(patch.deltas) == [names(layer) for layer in changes]
        for layer, change in changes.items():
            assert change.norm() > 0.1
            assert close(patch.deltas[names(layer)].dense().double(), change, 1e-4)
        if batch is SECOND:
            forgetful = method.fit(editor.bench, batch, State(), targets)[0]
            differs = [
                not close(forgetful.deltas[name].dense(), delta.dense(), 1e-2) for name, delta in patch.deltas.items()
            ]
            assert differs == [variant in ("alphaedit", "rlsedit")] * 2
        editor._weights.commit(patch)
        state = after
    if variant in ("emmet", "alphaedit-"):
        assert state == State()
        return
    assert state.tensors.keys() == {"inverse|0", "inverse|1"}
    for layer, previous in plain.previous.items():
        carried, moment = state.tensors[f"inverse|{layer}"], editor.bench.moments.get([layer])[layer]
        c: Any = method.config
        if variant == "rlsedit":
            anchor = c.lam**2 * eye(WIDTH) + c.mu**2 * c.moment_weight * moment.matrix
            expected = inv(haired(anchor, moment.ridge) + previous)
        else:
            # The keys that count are those of the model after the batch.
            p = projector(moment.matrix, c.threshold)
            expected = p @ inv(p @ previous @ p + c.ridge * eye(WIDTH)) @ p
        assert close(carried, expected, 1e-4)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_alphaedit_leaves_what_ordinary_text_is_mapped_to(family: str, corpus_path: Path) -> None:
    """What a change within P does to an ordinary key, E||Delta k||^2, is at most threshold ||Delta||^2."""
    editor = editor_of(family, corpus_path, "alphaedit")
    patch = editor.edit(FIRST, score=False).commits[0].patch
    for layer in editor.method.layers():
        change = patch.deltas[editor.lm.layout.mlp_out_weight(layer)].dense().double()
        moment = editor.bench.moments.get([layer])[layer].matrix
        assert close(change @ projector(moment, 0.05), change, 1e-5)
        assert torch.trace(change @ moment @ change.T) < 0.05 * change.square().sum()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_one_layers_emmet_without_a_ridge_writes_the_values(family: str, corpus_path: Path) -> None:
    settings = {"layers": (1,), "ridge": 0.0, "contexts": (), **_TARGET}
    editor = make_editor(family, corpus_path, "emmet", method_settings=settings)
    plain = ByHand(family, editor)
    targets = editor.method.targets(editor.bench, FIRST)
    editor._weights.commit(editor.method.fit(editor.bench, FIRST, State(), targets)[0])
    plain.lm = editor.lm
    for edit, target in zip(FIRST, targets, strict=True):
        assert (plain.read(edit, 1)[1] - target.value).norm() < 1e-3 * target.delta.norm()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", ["alphaedit", "rlsedit"])
def test_a_stream_read_back_from_disk_goes_on_bit_for_bit(
    variant: str, family: str, corpus_path: Path, tmp_path: Path
) -> None:
    editor, folder = editor_of(family, corpus_path, variant), RunFolder(tmp_path)
    editor.edit(FIRST, score=False)
    saved = editor.state()
    folder.save_state(saved, len(FIRST))
    other = editor_of(family, corpus_path, variant)
    loaded, edits = folder.load_state(other.lm.device)
    assert edits == len(FIRST)
    other.load_state(loaded)
    # How a tensor lies in memory decides how products round, and differently for one key than for two.
    for batch in (SECOND, LAST):
        here, there = (each.edit(batch, score=False).commits[0].patch for each in (editor, other))
        assert all(torch.equal(delta.dense(), there.deltas[name].dense()) for name, delta in here.deltas.items())
        states = [each.state().method.tensors for each in (editor, other)]
        assert states[0].keys() == states[1].keys() == {"inverse|0", "inverse|1"}
        for name, tensor in states[0].items():
            assert tensor.dtype == torch.float64
            assert not torch.equal(tensor, saved.method.tensors[name])
            assert torch.equal(tensor, states[1][name])
    assert same_bits(other.lm, bits(editor.lm))


# --------------------------------------------------------------------------- what cannot be done


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_threshold_of_zero_names_the_smallest_eigenvalue_and_changes_nothing(family: str, corpus_path: Path) -> None:
    settings = {**METHOD_SETTINGS["alphaedit"], **_TARGET, "threshold": 0.0}
    editor = make_editor(shared(family), corpus_path, "alphaedit", method_settings=settings)
    before = bits(editor.lm)
    smallest = float(eigvalsh(editor.bench.moments.get([0])[0].matrix)[0])
    try:
        with pytest.raises(NumericalError, match=r"layer 0 .* nowhere to write") as caught:
            editor.edit(FIRST, score=False)
        named = float(str(caught.value).rpartition("the smallest is ")[2].split()[0])
        # What rounding leaves of a direction that no token of the text took may be said to be zero.
        assert named == pytest.approx(smallest, rel=1e-2, abs=1e-6)
        assert editor.state().method == State()
        assert same_bits(editor.lm, before)
    finally:
        editor.reset()


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", FAMILIES)
def test_emmet_refuses_two_answers_to_one_prompt_without_a_ridge_and_changes_nothing(
    family: str, corpus_path: Path
) -> None:
    one = home_town(0)
    other = home_town(0, home_town(10).target_new)
    assert one.target_new != other.target_new
    settings = {**METHOD_SETTINGS["emmet"], **_TARGET, "ridge": 0.0}
    editor = make_editor(shared(family), corpus_path, "emmet", method_settings=settings)
    before = bits(editor.lm)
    try:
        with pytest.raises(NumericalError, match="depend on each other"):
            editor.edit([one, other], score=False)
        assert same_bits(editor.lm, before)
    finally:
        editor.reset()
