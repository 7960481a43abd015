"""WilKE is ROME in the layer that needs the least change, and R-ROME is ROME with one key: both found here by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import SecondMoment
from everedit.engine.solve import Factor, rank_one_update
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig
from everedit.errors import EditError, NotApplicable, NumericalError
from everedit.experiments.folder import RunFolder
from everedit.methods import _rank_one
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import LowRank, Patch
from tests.oracles import plain_target
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "gptj", "gemma2", "opt", "llama"]
EDITS = [home_town(person) for person in (0, 10, 20)]
SCANNED = (1, 2, 3)  # the lowest layer would win every time
QUICK = {**METHOD_SETTINGS["wilke"]["target"], "steps": 10}


def editor_of(model: LanguageModel | str, corpus: Path, method: str = "wilke", **settings: Any) -> Editor:
    scan = {"layers": SCANNED} if method == "wilke" else {}
    chosen = {**METHOD_SETTINGS[method], "target": QUICK, **scan, **settings}
    return make_editor(model, corpus, method, method_settings=chosen)


def fitted(editor: Editor, edit: Edit, targets: list[Target] | None = None) -> Patch:
    before = bits(editor.lm)
    editor.prepare()
    patch, _ = editor.method.fit(editor.bench, [edit], State(), targets)
    assert same_bits(editor.lm, before)
    assert hooks_left(editor.lm) == []
    return patch


def the(patch: Patch) -> LowRank:
    """The one change that a patch holds."""
    [delta] = patch.deltas.values()
    assert isinstance(delta, LowRank)
    return delta


def same_parts(one: LowRank, other: LowRank) -> bool:
    return torch.equal(one.left, other.left) and torch.equal(one.right, other.right)


def read(lm: LanguageModel, module: nn.Module | int, edit: Edit, prefix: str = "") -> SimpleNamespace:
    """What a module (or a layer's down projection) takes and gives at the last token of prefix and prompt."""
    module = lm.layout.mlp_out(module) if isinstance(module, int) else module
    seen = SimpleNamespace()

    def hook(_: Any, args: Any, output: Tensor) -> None:
        seen.key, seen.value = (part.reshape(-1, part.shape[-1])[-1].double() for part in (args[0], output))

    handle = module.register_forward_hook(hook)
    ids = torch.tensor([lm.tokenizer(prefix + edit.prompt)["input_ids"]])
    with torch.no_grad():
        lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    handle.remove()
    return seen


def moment(editor: Editor, layer: int) -> Tensor:
    """C with the tiny ridge that the factor holds, too."""
    found = editor.bench.moments.get([layer])[layer]
    return found.matrix + found.ridge * found.matrix.diagonal().mean() * torch.eye(len(found.matrix)).double()


def by_hand(editor: Editor, lm: LanguageModel, layer: int, edit: Edit, delta: Tensor, write: str = "bare") -> Tensor:
    """r u^T / (k' . u) with u along C^-1 k: k is the mean key unless both keys shall be the bare one."""
    prefixes = editor.method.prefixes(editor.bench)
    keys = torch.stack([read(lm, layer, edit, prefix).key for prefix in prefixes])
    assert len(keys) == 3
    mean, written = keys.mean(0), keys.mean(0) if write == "mean" else keys[0]
    u = torch.linalg.inv(moment(editor, layer)) @ (keys[0] if write == "bare throughout" else mean)
    weight = oriented(lm.layout.mlp_out(layer)).double()
    # The value is what the bare prompt gives plus delta, whichever key it is written to.
    residual = weight @ keys[0] + delta.double() - weight @ written
    return torch.outer(residual, u) / (written @ u)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layers_change_is_of_rank_one_and_maps_the_key_to_the_value(family: str, corpus_path: Path) -> None:
    lm, edit = shared(family), EDITS[0]
    for layer in SCANNED:
        editor = editor_of(lm, corpus_path, layers=(layer,))
        change = the(fitted(editor, edit))
        dense, seen = change.dense().double(), read(lm, layer, edit)
        [target] = editor.method.targets_at(layer, editor.bench, [edit])
        gap = target.value.double() - seen.value
        assert gap.norm() > 0.1 * seen.value.norm()
        # The layer gives seen.value = W k + b; what the change adds is exactly what is missing.
        assert (dense @ seen.key - gap).norm() < 1e-5 * gap.norm()
        assert torch.linalg.matrix_rank(dense, rtol=1e-6) == 1
        expected = by_hand(editor, lm, layer, edit, target.delta)
        assert (dense - expected).norm() < 5e-3 * expected.norm()
        # ||Delta|| = ||v* - v|| / |k . u|
        u = torch.linalg.svd(expected)[2][0]
        assert change.norm() == pytest.approx(float(gap.norm() / (seen.key @ u).abs()), rel=5e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_rome_in_the_layer_where_that_needs_the_least(family: str, corpus_path: Path) -> None:
    lm = shared(family)
    for edit in EDITS[:2]:
        romes = {layer: the(fitted(editor_of(lm, corpus_path, "rome", layer=layer), edit)) for layer in SCANNED}
        norms = {layer: oriented(lm.layout.mlp_out(layer)).norm() for layer in SCANNED}
        sizes = {layer: float(rome.dense().norm() / norms[layer]) for layer, rome in romes.items()}
        patch = fitted(editor_of(lm, corpus_path), edit)
        assert patch.info["scores"] == {str(layer): pytest.approx(size, rel=1e-5) for layer, size in sizes.items()}
        least = min(sizes, key=lambda layer: sizes[layer])
        assert patch.info["layer"] == least == min(SCANNED, key=lambda layer: patch.info["scores"][str(layer)])
        assert [*patch.deltas] == [lm.layout.mlp_out_weight(least)]
        # Bit for bit, whether the range holds one layer or more.
        alone = fitted(editor_of(lm, corpus_path, layers=(1,)), edit)
        for found, rome in ((patch, romes[least]), (alone, romes[1])):
            assert same_parts(the(found), rome)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_stream_scans_the_edited_model_with_the_unedited_ones_moments(family: str, corpus_path: Path) -> None:
    editor, unedited = (editor_of(model, corpus_path) for model in (family, shared(family)))
    lm, config, prefixes = editor.lm, TargetConfig(**QUICK), unedited.method.prefixes(unedited.bench)
    for edit in EDITS[:2]:
        expected = {}
        for layer in SCANNED:
            delta = plain_target(lm, edit, prefixes, layer, config, "mlp").delta
            change = by_hand(unedited, lm, layer, edit, delta)
            expected[str(layer)] = float(change.norm() / oriented(lm.layout.mlp_out(layer)).norm())
        [commit] = editor.stream([edit])
        assert commit.patch.info["scores"] == pytest.approx(expected, rel=1e-2)
        assert str(commit.patch.info["layer"]) == min(expected, key=lambda layer: expected[layer])


@pytest.mark.parametrize("layer", SCANNED)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_the_layer_with_a_planted_pattern_is_chosen(family: str, layer: int, corpus_path: Path) -> None:
    """A neuron that fires on this fact alone and writes nothing: the model's function stays, its key grows."""
    edit, spare = EDITS[0], 7
    silent, planted = fresh(family), fresh(family)
    for lm in (silent, planted):
        for index in SCANNED:
            reader = lm.layout.block(index).get_submodule(lm.layout.mlp_in_names[0])
            oriented(reader)[spare], reader.bias.data[spare], oriented(lm.layout.mlp_out(index))[:, spare] = 0, 0, 0
    reader = planted.layout.block(layer).get_submodule(planted.layout.mlp_in_names[0])
    pattern = read(planted, reader, edit).key.float()
    oriented(reader)[spare], reader.bias.data[spare] = 200 * pattern / (pattern @ pattern), -100
    keys = [read(lm, layer, edit).key for lm in (silent, planted)]
    assert keys[1].norm() > 10 * keys[0].norm()
    before, after = (fitted(editor_of(lm, corpus_path), edit).info for lm in (silent, planted))
    assert after["layer"] == layer
    assert after["scores"][str(layer)] < 0.8 * before["scores"][str(layer)]
    for other in set(SCANNED) - {layer}:
        assert after["scores"][str(other)] == pytest.approx(before["scores"][str(other)], rel=1e-4)


def counts(layers: list[int]) -> dict[str, int]:
    return {str(layer): layers.count(layer) for layer in layers}


def test_how_often_each_layer_was_chosen_is_kept_and_saved(tmp_path: Path, corpus_path: Path) -> None:
    editor, other = (editor_of("opt", corpus_path) for _ in range(2))
    state, chosen = State(), []
    for edit in (EDITS[0], EDITS[1], EDITS[0]):
        given = state
        patch, state = editor.method.fit(editor.bench, [edit], given)
        # The state that was given is not counted up in place.
        assert given == (State(values={"chosen": counts(chosen)}) if chosen else State())
        chosen.append(patch.info["layer"])
    assert len(set(chosen)) == 2
    assert state == State(values={"chosen": counts(chosen)})
    # A stream that was saved goes on where it was, to the same bits.
    commits = list(editor.stream(EDITS[:2]))
    RunFolder(tmp_path).save_state(editor.state(), 2)
    commits += editor.stream(EDITS[2:])
    other.prepare()
    other.load_state(RunFolder(tmp_path).load_state(other.lm.device)[0])
    list(other.stream(EDITS[2:]))
    expected = counts([commit.patch.info["layer"] for commit in commits])
    assert editor.state().method.values == other.state().method.values == {"chosen": expected}
    assert same_bits(other.lm, bits(editor.lm))
    commits[0].patch.save(tmp_path / "patch")
    assert Patch.load(tmp_path / "patch").info == commits[0].patch.info


def test_it_refuses_batches_and_policies_that_work_on_values(corpus_path: Path) -> None:
    lm = shared("gpt2")
    for policy in ("nas", "nas+simie"):
        with pytest.raises(NotApplicable, match="nas works on solved values, and wilke solves for none"):
            make_editor(lm, corpus_path, "wilke", policy)
    editor = editor_of(lm, corpus_path)
    with pytest.raises(EditError, match="wilke makes one edit at a time"):
        editor.method.fit(editor.bench, EDITS, State())


def test_an_edit_and_its_undoing_leave_a_linear_memory_as_it_was() -> None:
    random = torch.Generator().manual_seed(0)
    weight, roots, mean, bare, value = (
        torch.randn(*shape, dtype=torch.float64, generator=random) for shape in ((5, 8), (8, 20), (8,), (8,), (5,))
    )
    factor, now = Factor.of(roots @ roots.T), weight
    for wanted in (value, weight @ bare):
        now = now + rank_one_update(factor, mean, bare, wanted - now @ bare).dense()
        assert torch.allclose(now @ bare, wanted)
        assert torch.allclose(now, weight) == (wanted is not value)


KEYS = [("rome", {}, "bare"), ("r-rome", {}, "mean"), ("r-rome", {"key": "bare"}, "bare throughout")]


@pytest.mark.parametrize("family", FAMILIES)
def test_r_rome_uses_one_key_throughout(family: str, corpus_path: Path) -> None:
    lm, edit, layer = shared(family), EDITS[0], 1
    expected, found = {}, {}
    for method, settings, write in KEYS:
        editor = editor_of(lm, corpus_path, method, layer=layer, **settings)
        targets = editor.method.targets(editor.bench, [edit])
        patch = fitted(editor, edit, targets)
        assert [*patch.deltas] == [lm.layout.mlp_out_weight(layer)]
        found[write] = the(patch).dense().double()
        expected[write] = by_hand(editor, lm, layer, edit, targets[0].delta, write)
    for write, change in found.items():
        distances = {other: float((change - expected[other]).norm() / change.norm()) for other in expected}
        assert distances.pop(write) < 2e-3
        assert min(distances.values()) > 1e-2
        assert torch.linalg.matrix_rank(change, rtol=1e-6) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_the_bare_prompt_alone_r_rome_is_rome_and_emmet(family: str, corpus_path: Path) -> None:
    lm, edit = shared(family), EDITS[0]
    editors = [editor_of(lm, corpus_path, method, contexts=(), **settings) for method, settings, _ in KEYS]
    targets = editors[0].method.targets(editors[0].bench, [edit])
    rome, *others = (the(fitted(editor, edit, targets)) for editor in editors)
    assert all(same_parts(other, rome) for other in others)
    if lm.layout.mlp_norm(1) is not None:
        return  # EMMET writes the block's output there, which is no linear function of the MLP's
    # A batch of one without ridge, whatever the scale of C; EMMET's value is what the block gives, plus delta.
    for scale in (1.0, 1e3):
        emmet = editor_of(lm, corpus_path, "emmet", layers=(1,), contexts=(), moment_scale=scale, ridge=0.0)
        [block] = emmet.method.targets(emmet.bench, [edit])
        change = the(fitted(emmet, edit, [replace(block, delta=targets[0].delta)])).dense()
        assert (change - rome.dense()).norm() < 1e-3 * rome.norm()


@pytest.mark.parametrize("key", ["mean", "bare"])
def test_r_romes_change_does_not_depend_on_the_scale_of_c(
    key: str, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(shared("llama"), corpus_path, "r-rome", key=key)
    targets = editor.method.targets(editor.bench, EDITS[:1])
    original = the(fitted(editor, EDITS[0], targets)).dense()
    held = editor.bench.moments.get([1])[1].matrix
    for matrix, same in ((1e-3 * held, True), (50 * held, True), (torch.eye(len(held)).double(), False)):
        second = {1: SecondMoment(1, matrix, 1)}
        monkeypatch.setattr(editor.bench.moments, "get", lambda layers, second=second: second)
        change = the(editor.method.fit(editor.bench, EDITS[:1], State(), targets)[0]).dense()
        assert bool((change - original).norm() < 1e-4 * original.norm()) is same


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_where_romes_two_keys_disagree_its_change_explodes_and_r_romes_does_not(
    family: str, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, edit = shared(family), EDITS[0]
    editors = {method: editor_of(lm, corpus_path, method) for method in ("rome", "r-rome")}
    targets = editors["rome"].method.targets(editors["rome"].bench, [edit])
    keys = _rank_one.subject_keys(lm, [edit], editors["rome"].method.prefixes(editors["rome"].bench), 1)
    u = torch.linalg.inv(moment(editors["rome"], 1)) @ keys[0].mean(0).double()

    def norm(method: str, share: float) -> float:
        """With only a share of the bare key's part along u; another context takes the rest, so the mean stays."""
        taken = ((1 - share) * (keys[0, 0].double() @ u) / (u @ u) * u).float()
        moved = keys + torch.stack([-taken, taken, torch.zeros_like(taken)])
        monkeypatch.setattr(_rank_one, "subject_keys", lambda *_: moved)
        return the(fitted(editors[method], edit, targets)).norm()

    assert norm("rome", 1e-3) == pytest.approx(1e3 * norm("rome", 1.0), rel=1e-2)
    with pytest.raises(NumericalError, match=r"(?s)almost orthogonal.*r-rome"):
        norm("rome", 0.0)
    assert norm("r-rome", 0.0) < 2 * norm("r-rome", 1.0)
