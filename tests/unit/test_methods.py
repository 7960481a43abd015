"""ROME and MEMIT write what their equations say, found here a second time: plain forwards, plain inverses, float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import Corpus, SecondMoment
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import EditError, NumericalError
from everedit.models import LanguageModel, load_model
from everedit.models.layout import oriented
from everedit.patch import Patch
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

PLAIN = ["gpt2", "gptj", "opt", "llama"]  # transposed weights, a parallel block, tokens in a line, a gated MLP
EDITS = [home_town(person) for person in (0, 10, 20)]


def editor_of(family: str, corpus: Path, method: str, **settings: Any) -> Editor:
    chosen = {**METHOD_SETTINGS[method], **settings}
    return make_editor(shared(family), corpus, method, method_settings=chosen)


def fitted(editor: Editor, edits: Sequence[Edit]) -> tuple[Patch, list[Target]]:
    """The method's patch and the targets it was given; the model stays as it is."""
    before = bits(editor.lm)
    editor.prepare()
    targets = editor.method.targets(editor.bench, edits)
    patch, state = editor.method.fit(editor.bench, edits, State(), targets)
    assert state == State()
    assert same_bits(editor.lm, before)
    assert hooks_left(editor.lm) == []
    return patch, targets


class Plain:
    """A model read one text at a time by whole forwards, and written to in place."""

    def __init__(self, family: str) -> None:
        self.lm = fresh(family)

    def read(self, edit: Edit, layer: int, prefix: str = "") -> SimpleNamespace:
        """Key, MLP output and block output of a layer at the last token of prefix and prompt (they end there)."""
        seen: dict[str, Tensor] = {}
        module, block = self.lm.layout.mlp_out(layer), self.lm.layout.block(layer)

        def mlp_hook(_: Any, args: Any, output: Tensor) -> None:
            seen["key"], seen["mlp"] = (part.reshape(-1, part.shape[-1])[-1] for part in (args[0], output))

        def block_hook(_: Any, __: Any, output: Any) -> None:
            seen["state"] = (output[0] if isinstance(output, tuple) else output)[0, -1]

        handles = [module.register_forward_hook(mlp_hook), block.register_forward_hook(block_hook)]
        ids = self.lm.tokenizer(prefix + edit.prompt, return_tensors="pt").input_ids
        self.lm.model(ids)
        for handle in handles:
            handle.remove()
        return SimpleNamespace(**{name: tensor.detach().clone().double() for name, tensor in seen.items()})

    def keys(self, edit: Edit, layer: int, prefixes: Sequence[str]) -> Tensor:
        return torch.stack([self.read(edit, layer, prefix).key for prefix in prefixes])

    def add(self, layer: int, change: Tensor) -> None:
        weight = oriented(self.lm.layout.mlp_out(layer))
        weight.copy_(weight.double() + change)


def moment(editor: Editor, layer: int) -> Tensor:
    """C with the tiny ridge that the factor holds, too."""
    found = editor.bench.moments.get([layer])[layer]
    return found.matrix + found.ridge * found.matrix.diagonal().mean() * torch.eye(len(found.matrix)).double()


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))


# --------------------------------------------------------------------------- ROME


@pytest.mark.parametrize("family", [*PLAIN, "gemma2"])
@pytest.mark.parametrize(
    ("method", "settings", "write_key"),
    [("rome", {}, "bare"), ("r-rome", {}, "mean"), ("r-rome", {"key": "bare"}, "bare")],
)
def test_rome_maps_the_key_to_the_value(
    method: str, settings: dict[str, Any], write_key: str, family: str, corpus_path: Path
) -> None:
    editor, edit, plain = editor_of(family, corpus_path, method, **settings), EDITS[0], Plain(family)
    patch, [target] = fitted(editor, [edit])
    assert target.delta.norm() > 0.1 * target.origin.norm()
    assert torch.allclose(plain.read(edit, 1).mlp.float(), target.origin, atol=1e-4)
    prefixes = editor.method.prefixes(editor.bench)
    keys = plain.keys(edit, 1, prefixes)
    module = editor.lm.layout.mlp_out(1)
    weight = oriented(module).double() + patch.deltas[editor.lm.layout.mlp_out_weight(1)].dense().double()
    bias = 0 if getattr(module, "bias", None) is None else module.bias.double()  # type: ignore[union-attr]
    reached = {name: weight @ key + bias for name, key in (("bare", keys[0]), ("mean", keys.mean(0)))}
    error = {name: float((out - target.value.double()).norm() / target.delta.norm()) for name, out in reached.items()}
    assert error[write_key] < 1e-5
    # The two keys are not the same, so that only the one that was asked for is mapped exactly.
    assert max(error.values()) > 1e-4
    if write_key == "bare":
        plain.add(1, patch.deltas[editor.lm.layout.mlp_out_weight(1)].dense().double())
        assert torch.allclose(plain.read(edit, 1).mlp.float(), target.value, atol=1e-3)


@pytest.mark.parametrize("family", PLAIN)
def test_romes_change_has_rank_one_along_c_inverse_k(family: str, corpus_path: Path) -> None:
    editor, edit = editor_of(family, corpus_path, "rome"), EDITS[0]
    patch, [target] = fitted(editor, [edit])
    assert list(patch.deltas) == [editor.lm.layout.mlp_out_weight(1)]
    change = patch.deltas[editor.lm.layout.mlp_out_weight(1)].dense().double()
    left, sizes, right = torch.linalg.svd(change)
    assert sizes[1] < 1e-6 * sizes[0]
    mean = Plain(family).keys(edit, 1, editor.method.prefixes(editor.bench)).mean(0)
    direction = torch.linalg.inv(moment(editor, 1)) @ mean
    assert abs(cosine(right[0], direction)) > 1 - 1e-5
    assert abs(cosine(left[:, 0], target.delta.double())) > 1 - 1e-5
    # It is not along the key itself: C matters; and what is orthogonal to C^-1 k is not touched.
    assert abs(cosine(right[0], mean)) < 0.99
    away = torch.linspace(-1, 1, len(mean)).double()
    away -= direction * (away @ direction) / (direction @ direction)
    assert (change @ away).norm() < 1e-4 * sizes[0] * away.norm()


@pytest.mark.parametrize("scale", [1e-3, 50.0])
def test_romes_change_does_not_depend_on_the_scale_of_c(
    scale: float, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of("gpt2", corpus_path, "rome")
    patch, targets = fitted(editor, EDITS[:1])
    store, name = editor.bench.moments, editor.lm.layout.mlp_out_weight(1)
    held = store.get([1])[1]

    def changed_by(matrix: Tensor) -> Tensor:
        monkeypatch.setattr(store, "get", lambda layers: {1: SecondMoment(1, matrix, held.tokens)})
        return editor.method.fit(editor.bench, EDITS[:1], State(), targets)[0].deltas[name].dense()

    original = patch.deltas[name].dense()
    assert torch.allclose(changed_by(held.matrix * scale), original, atol=1e-5 * float(original.norm()))
    along_key = changed_by(torch.eye(len(held.matrix), dtype=torch.float64) * scale)
    mean = Plain("gpt2").keys(EDITS[0], 1, editor.method.prefixes(editor.bench)).mean(0)
    assert abs(cosine(torch.linalg.svd(along_key.double())[2][0], mean)) > 1 - 1e-6


@pytest.mark.parametrize("method", ["rome", "r-rome"])
def test_without_second_moments_the_change_is_along_the_key(method: str, corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, method, second_moments=False, contexts=[[5, 2]])
    assert editor.method.moment_layers() == ()
    patch, [target] = fitted(editor, EDITS[:1])
    change = patch.deltas[editor.lm.layout.mlp_out_weight(1)].dense().double()
    mean = Plain("gpt2").keys(EDITS[0], 1, editor.method.prefixes(editor.bench)).mean(0)
    left, _, right = torch.linalg.svd(change)
    assert abs(cosine(right[0], mean)) > 1 - 1e-6
    assert abs(cosine(left[:, 0], target.delta.double())) > (1 - 1e-5 if method == "rome" else 0.9)


def test_rome_makes_one_edit_at_a_time(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, "rome")
    with pytest.raises(EditError, match="one edit at a time"):
        editor.method.fit(editor.bench, EDITS[:2], State())


# --------------------------------------------------------------------------- MEMIT


def memit_by_hand(editor: Editor, edits: Sequence[Edit], targets: Sequence[Target], weight: float) -> dict[int, Tensor]:
    """Equations 14 and 20 as they stand, on a copy whose weights are really written, layer after layer."""
    layers, prefixes = editor.method.layers(), editor.method.prefixes(editor.bench)
    plain = Plain(editor.lm.name.rpartition("/")[2].rpartition("-")[0])
    wanted = torch.stack([target.value.double() for target in targets], dim=1)
    changes = {}
    for index, layer in enumerate(layers):
        columns = []
        for edit in edits:
            keys = plain.keys(edit, layer, prefixes)
            columns.append(keys[0] / 2 + keys[1:].mean(0) / 2 if len(keys) > 1 else keys[0])
        k = torch.stack(columns, dim=1)
        h = torch.stack([plain.read(edit, layers[-1]).state for edit in edits], dim=1)
        r = (wanted - h) / (len(layers) - index)
        changes[layer] = r @ k.T @ torch.linalg.inv(weight * moment(editor, layer) + k @ k.T)
        plain.add(layer, changes[layer])
    return changes


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("n", [1, 3])
def test_memit_is_its_closed_form_layer_after_layer(
    n: int, layers: tuple[int, ...], family: str, corpus_path: Path
) -> None:
    weight = 3.0
    editor = editor_of(family, corpus_path, "memit", layers=layers, moment_weight=weight)
    patch, targets = fitted(editor, EDITS[:n])
    expected = memit_by_hand(editor, EDITS[:n], targets, weight)
    assert list(patch.deltas) == [editor.lm.layout.mlp_out_weight(layer) for layer in layers]
    for layer, change in expected.items():
        delta = patch.deltas[editor.lm.layout.mlp_out_weight(layer)]
        assert delta.rank() == n
        assert change.norm() > 1e-2
        assert (delta.dense().double() - change).norm() < 1e-4 * change.norm()


def test_memits_later_layers_see_the_earlier_changes(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, "memit", layers=(0, 1), moment_weight=0.1)
    patch, targets = fitted(editor, EDITS)
    second = patch.deltas[editor.lm.layout.mlp_out_weight(1)].dense()
    # The last layer alone, on the untouched model, closes a larger gap.
    alone = editor_of("llama", corpus_path, "memit", layers=(1,), moment_weight=0.1)
    other = alone.method.fit(alone.bench, EDITS, State(), targets)[0].deltas[editor.lm.layout.mlp_out_weight(1)]
    assert (second - other.dense()).norm() > 0.1 * other.norm()


def test_memit_solves_a_batch_together_and_in_any_order(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, "memit", layers=(1,), moment_weight=1.0)
    patch, targets = fitted(editor, EDITS)
    name = editor.lm.layout.mlp_out_weight(1)
    together = patch.deltas[name].dense()
    back = editor.method.fit(editor.bench, EDITS[::-1], State(), targets[::-1])[0].deltas[name].dense()
    assert torch.allclose(together, back, atol=1e-5 * float(together.norm()))
    singles = [
        editor.method.fit(editor.bench, [edit], State(), [target])[0].deltas[name].dense()
        for edit, target in zip(EDITS, targets, strict=True)
    ]
    assert (together - torch.stack(singles).sum(0)).norm() > 1e-2 * together.norm()


def residual_states(family: str, edits: Sequence[Edit], patch: Patch | None, layer: int) -> Tensor:
    plain = Plain(family)
    for name, delta in patch.deltas.items() if patch else ():
        weight = oriented(plain.lm.layout.module_of(name))
        weight.copy_(weight.double() + delta.dense().double())
    return torch.stack([plain.read(edit, layer).state for edit in edits])


@pytest.mark.parametrize("family", PLAIN)
def test_one_layer_and_one_edit_without_moments_write_the_target(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, "memit", layers=(1,), moment_weight=1e-9, contexts=())
    patch, [target] = fitted(editor, EDITS[:1])
    [state] = residual_states(family, EDITS[:1], patch, 1)
    [before] = residual_states(family, EDITS[:1], None, 1)
    gap = float((before - target.value.double()).norm())
    assert gap == pytest.approx(float(target.delta.norm()), rel=1e-4)
    assert float((state - target.value.double()).norm()) < 1e-4 * gap


@pytest.mark.parametrize("family", [*PLAIN, "gemma2"])
def test_memit_closes_most_of_the_gap_of_a_batch(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, "memit")
    patch, targets = fitted(editor, EDITS)
    wanted = torch.stack([target.value.double() for target in targets])
    gaps = [float((residual_states(family, EDITS, p, 1) - wanted).norm(dim=1).mean()) for p in (None, patch)]
    # A norm behind the MLP bounds how far a layer can go.
    assert gaps[1] < (0.7 if family == "gemma2" else 0.35) * gaps[0]


def test_much_weight_on_the_moments_changes_nothing(corpus_path: Path) -> None:
    norms = []
    for weight in (1e-2, 1.0, 1e2, 1e8):
        editor = editor_of("gpt2", corpus_path, "memit", moment_weight=weight)
        norms.append(fitted(editor, EDITS[:1])[0].norm())
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-3 < norms[0]


def test_the_root_share_takes_more_at_first(corpus_path: Path) -> None:
    deltas = {}
    for share in ("equal", "sqrt"):
        editor = editor_of("gpt2", corpus_path, "memit", share=share)
        patch, _ = fitted(editor, EDITS[:1])
        deltas[share] = patch.deltas[editor.lm.layout.mlp_out_weight(0)].norm()
    assert deltas["sqrt"] == pytest.approx(deltas["equal"] * 2**0.5, rel=1e-4)


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_a_target_that_is_not_finite_writes_nothing(method: str, corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, method)
    editor.prepare()
    [target] = editor.method.targets(editor.bench, EDITS[:1])
    broken = replace(target, origin=target.origin * float("inf"), delta=target.delta * float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        editor.method.fit(editor.bench, EDITS[:1], State(), [broken])[0].require_finite()


@pytest.mark.real
def test_a_real_models_edit_maps_key_to_value(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVEREDIT_CACHE")
    lm: LanguageModel = load_model("smollm2-135m", device="cpu")
    edit = Edit(prompt="The capital city of Kenya", subject="Kenya", target_new="is Cairo")
    settings = {"contexts": [[6, 2]], "target": {"steps": 4}}
    editor = Editor(lm, "r-rome", method_settings=settings, corpus=Corpus(corpus_path, 2048, 128))
    editor.bench.moments.root = corpus_path.parent
    patch, [target] = fitted(editor, [edit])
    [(name, delta)] = patch.deltas.items()
    keys = [editor.lm.inputs_of({0: lm.layout.module_of(name)}, lm.pad([lm.encode(prefix + edit.prompt).ids]))[0][0, -1]
            for prefix in editor.method.prefixes(editor.bench)]  # fmt: skip
    weight = oriented(lm.layout.module_of(name)).double() + delta.dense().double()
    reached = weight @ torch.stack(keys).mean(0).double()
    assert (reached - target.value.double()).norm() < 1e-4 * target.delta.norm()
