"""UltraEdit against its equations: gradients by whole forwards, statistics of all rows at once, the primal form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.gradients import module_gradients
from everedit.engine.running import RunningMoments
from everedit.engine.state import State
from everedit.methods import ultraedit
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import load_tensors, save_tensors
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

# Prompts of different lengths and targets of one, two and three tokens.
EDITS = [home_town(17, "New Delhi"), home_town(10, "Lisbon"), home_town(0, "Buenos Aires piano"), home_town(3, "Oslo")]
PLACES: dict[str, dict[str, tuple[int, ...]]] = {
    "gpt2": {"mlp_out": (1, 2), "mlp_in": (2,)},
    "llama": {"mlp_gate": (1,), "mlp_up": (2,), "mlp_out": (2,)},
    "opt": {"mlp_out": (1, 2)},
}
Pair = tuple[Tensor, Tensor]


def editor_of(family: str, corpus: Path, **settings: Any) -> Editor:
    chosen = {"modules": PLACES[family], "eta": 1e-3, "chunk": 3, **settings}
    return make_editor(shared(family), corpus, "ultraedit", method_settings=chosen)


def fit(editor: Editor, edits: Sequence[Edit], state: State | None = None) -> tuple[dict[str, Tensor], State]:
    before, generator = bits(editor.lm), torch.get_rng_state()
    patch, after = editor.method.fit(editor.bench, edits, state or State())
    assert same_bits(editor.lm, before)
    assert hooks_left(editor.lm) == []
    assert torch.equal(torch.get_rng_state(), generator)
    return {name: delta.dense().double() for name, delta in patch.deltas.items()}, after


def keeping(seen: dict[str, Pair], name: str) -> Callable[..., None]:
    def hook(_: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen[name] = args[0], output

    return hook


def plain_gradients(
    lm: LanguageModel, edits: Sequence[Edit], names: Sequence[str], everywhere: bool
) -> dict[str, Pair]:
    """One unpadded forward of the whole model for each text, all weights wanting gradients, a backward through all."""
    weights = list(lm.model.parameters())
    texts = []
    for edit in edits:
        prompt, whole = (lm.tokenizer(text)["input_ids"] for text in (edit.prompt, f"{edit.prompt} {edit.target_new}"))
        assert whole[: len(prompt)] == prompt
        texts.append((whole, len(prompt)))
    labelled = sum(len(whole) - end for whole, end in texts)
    found: dict[str, list[Pair]] = {name: [] for name in names}
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for whole, end in texts:
            seen: dict[str, Pair] = {}
            handles = [lm.layout.module_of(name).register_forward_hook(keeping(seen, name)) for name in names]
            with torch.enable_grad():
                logits = lm.model(torch.tensor([whole]), use_cache=False).logits[0].float()
                nll = F.cross_entropy(logits[end - 1 : -1], torch.tensor(whole[end:]), reduction="sum")
                (nll / labelled).backward()
            for handle in handles:
                handle.remove()
            rows = slice(0, len(whole) - 1) if everywhere else slice(end - 1, len(whole) - 1)
            for name, (given, output) in seen.items():
                assert output.grad is not None
                flat = (part.detach().reshape(len(whole), -1)[rows] for part in (given, output.grad))
                found[name].append((next(flat), next(flat)))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
    return {name: (torch.cat([h for h, _ in part]), torch.cat([g for _, g in part])) for name, part in found.items()}


def rows_of(editor: Editor, edits: Sequence[Edit], chunk: int = 3) -> dict[str, Pair]:
    """All pairs of a turn, chunk by chunk, by whole forwards."""
    names = editor.method.weights(editor.lm.layout)
    parts = [plain_gradients(editor.lm, edits[at : at + chunk], names, False) for at in range(0, len(edits), chunk)]
    return {
        name: (torch.cat([part[name][0] for part in parts]), torch.cat([part[name][1] for part in parts]))
        for name in names
    }


def primal(pair: Pair, all_rows: Sequence[Pair], eta: float, ridge: float) -> Tensor:
    """(H^T H + ridge I)^-1 H^T V with an explicit inverse; mean and deviation of all rows of this shape at once."""
    rows = torch.cat([torch.cat(other, dim=1) for other in all_rows]).double()
    h, g = (part.double() for part in pair)
    tilde = (torch.cat([h, g], dim=1) - rows.mean(0)) / rows.std(0).clamp_min(1e-30)
    v = -eta * tilde[:, : h.shape[1]].pow(2).sum(1, keepdim=True) * tilde[:, h.shape[1] :]
    return (torch.linalg.inv(h.T @ h + ridge * torch.eye(h.shape[1]).double()) @ h.T @ v).T


def unit_statistics(editor: Editor) -> State:
    """Statistics of so many rows with mean 0 and deviation 1 that one turn more does not move them."""
    count, tensors = 10**13, {}
    for name in editor.method.weights(editor.lm.layout):
        out, width = oriented(editor.lm.layout.module_of(name)).shape
        key = f"{width}x{out}"
        tensors[f"mean|{key}"] = torch.zeros(width + out).double()
        tensors[f"squares|{key}"] = torch.full((width + out,), float(count - 1)).double()
    return State(tensors, {"rows": {key.removeprefix("mean|"): count for key in tensors if key.startswith("mean")}})


def near(found: Tensor, expected: Tensor, slack: float = 1e-3) -> bool:
    assert float(expected.norm()) > 0
    return bool((found.double() - expected.double()).norm() <= slack * expected.double().norm())


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("positions", ["answers", "all"])
@pytest.mark.parametrize("family", PLACES)
def test_inputs_and_gradients_are_those_of_whole_forwards_of_single_texts(family: str, positions: str) -> None:
    lm = shared(family)
    layout = lm.layout
    names = [layout.mlp_out_weight(0), *layout.mlp_in_weights(1), layout.mlp_out_weight(2), layout.mlp_out_weight(3)]
    texts = [lm.encode(edit.prompt, edit.target_new) for edit in EDITS]
    found = module_gradients(lm, texts, {name: layout.module_of(name) for name in names}, positions=positions)
    expected = plain_gradients(lm, EDITS, names, positions == "all")
    assert hooks_left(lm) == []
    assert list(found) == names
    for name, (inputs, gradients) in expected.items():
        assert found[name][0].shape == inputs.shape
        assert near(found[name][0], inputs, 1e-4)
        assert near(found[name][1], gradients)


@pytest.mark.parametrize("family", PLACES)
def test_an_answer_of_n_tokens_gives_n_rows_from_the_prompts_last_token_on(family: str) -> None:
    lm, module = shared(family), shared(family).layout.mlp_out(1)
    text = lm.encode(EDITS[2].prompt, "Cairo now")
    n = len(text.target_ids)
    assert n >= 2
    [inputs], [gradients] = zip(*module_gradients(lm, [text], {"out": module}).values(), strict=True)
    assert (len(inputs), len(gradients)) == (n, n)
    # The prompt alone ends where the first row is; the row before it is another one.
    prompt = lm.inputs_of({"out": module}, lm.pad([lm.tokenizer(EDITS[2].prompt)["input_ids"]]))["out"]
    prompt = prompt.reshape(-1, prompt.shape[-1])
    assert near(inputs[0], prompt[-1], 1e-4)
    assert not near(inputs[0], prompt[-2], 1e-2)


# --------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (1, 1, 1, 37), (13, 2, 25), (20, 20)])
def test_statistics_merged_in_any_split_are_those_of_all_rows(sizes: tuple[int, ...]) -> None:
    rows = torch.randn(40, 7, generator=torch.Generator().manual_seed(1)) * 3 + 100
    first, *rest = (RunningMoments.of(part) for part in rows.split(list(sizes)))
    for part in rest:
        first = first.joined(part)
    assert first.count == 40
    torch.testing.assert_close(first.mean, rows.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(first.deviation(), rows.double().std(0), rtol=1e-12, atol=0)
    expected = (rows.double() - rows.double().mean(0)) / rows.double().std(0)
    torch.testing.assert_close(first.normalised(rows), expected, rtol=1e-9, atol=1e-9)


def test_a_component_that_never_varies_stays_small() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    rows[:, 1], rows[:, 3] = 0.0, 0.1  # a dead neuron, and a constant whose mean rounds
    found = RunningMoments.of(rows).normalised(rows)
    assert bool(found.isfinite().all())
    assert float(found[:, [1, 3]].abs().max()) < 1e-6
    assert float(found[:, [0, 2]].abs().max()) > 1
    assert float(RunningMoments.of(rows[:1]).deviation().max()) == 0.0


@pytest.mark.parametrize("family", PLACES)
def test_modules_of_one_shape_share_statistics_that_hold_every_row_once(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path)
    _, state = fit(editor, EDITS)
    grouped: dict[str, list[Tensor]] = {}
    for inputs, gradients in rows_of(editor, EDITS).values():
        grouped.setdefault(f"{inputs.shape[1]}x{gradients.shape[1]}", []).append(torch.cat([inputs, gradients], 1))
    # gpt2: two down projections and an up projection; llama: gate and up together; opt: one shape alone.
    assert len(grouped) == (1 if family == "opt" else 2)
    assert state.values["rows"] == {key: sum(map(len, parts)) for key, parts in grouped.items()}
    for key, parts in grouped.items():
        rows = torch.cat(parts).double()
        assert near(state.tensors[f"mean|{key}"], rows.mean(0), 1e-4)
        assert near(state.tensors[f"squares|{key}"], (rows - rows.mean(0)).pow(2).sum(0), 1e-3)


# --------------------------------------------------------------------------- the change


@pytest.mark.parametrize("ridge", [1.0, 0.01])
@pytest.mark.parametrize("family", PLACES)
def test_the_change_is_the_primal_ridge_regression(family: str, ridge: float, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, ridge=ridge)
    found, _ = fit(editor, EDITS)
    pairs = rows_of(editor, EDITS)
    assert sorted(found) == sorted(pairs)
    for name, pair in pairs.items():
        same_shape = [other for other in pairs.values() if [p.shape for p in other] == [p.shape for p in pair]]
        assert near(found[name], primal(pair, same_shape, 1e-3, ridge), 5e-3)


def made_up(editor: Editor, monkeypatch: pytest.MonkeyPatch, rows: int, seed: int = 3) -> Pair:
    """Rows of our own in place of a model's, the same for every module."""
    out, width = oriented(editor.lm.layout.mlp_out(1)).shape
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(rows, width, generator=generator), 0.1 * torch.randn(rows, out, generator=generator)
    monkeypatch.setattr(ultraedit, "module_gradients", lambda lm, texts, modules, **_: dict.fromkeys(modules, pair))
    return pair


def test_a_single_row_reaches_its_value_up_to_the_ridges_share(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of("gpt2", corpus_path, modules={"mlp_out": (1,)}, ridge=1.0, chunk=10)
    h, g = made_up(editor, monkeypatch, 1)
    [change] = fit(editor, EDITS, unit_statistics(editor))[0].values()
    size = float(h.double().pow(2).sum())
    value = -1e-3 * size * g[0].double()
    assert near(change @ h[0].double(), value * size / (1 + size), 1e-5)


def test_what_is_orthogonal_to_the_turns_inputs_is_not_moved(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of("gpt2", corpus_path, chunk=10, modules={"mlp_out": (1, 2)})
    h, _ = made_up(editor, monkeypatch, 12)
    basis = torch.linalg.qr(h.double().T)[0]
    away = torch.randn(h.shape[1], generator=torch.Generator().manual_seed(4)).double()
    away -= basis @ (basis.T @ away)
    for change in fit(editor, EDITS)[0].values():
        assert change.norm() > 0
        assert (change @ away).norm() < 1e-5 * change.norm() * away.norm()
        assert (change @ h[0].double()).norm() > 1e-2 * change.norm()


def test_a_step_of_size_zero_changes_no_bit_and_still_counts_the_rows(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path, "ultraedit", method_settings={"modules": PLACES["gpt2"], "eta": 0.0})
    before = bits(editor.lm)
    editor.edit(EDITS[:2], score=False)
    assert same_bits(editor.lm, before)
    tokens = sum(len(editor.lm.encode(edit.prompt, edit.target_new).target_ids) for edit in EDITS[:2])
    # Two modules have the one shape, one module the other.
    assert editor.state().method.values["rows"] == {"256x64": 2 * tokens, "64x256": tokens}


@pytest.mark.parametrize("family", PLACES)
def test_a_small_step_lowers_the_loss(family: str, corpus_path: Path) -> None:
    """With mean 0 and deviation 1 the change is a damped gradient step: down, and half as far with half the step."""
    drops = []
    for eta in (1e-4, 5e-5):
        editor = editor_of(family, corpus_path, eta=eta)
        changes, _ = fit(editor, EDITS, unit_statistics(editor))
        lm = fresh(family)
        start = sum(losses(lm, EDITS))
        for name, change in changes.items():
            weight = oriented(lm.layout.module_of(name))
            weight.copy_(weight.double() + change)
        drops.append(start - sum(losses(lm, EDITS)))
    assert drops[0] > drops[1] > 1e-4
    assert math.isclose(drops[0] / drops[1], 2, rel_tol=0.25)


# --------------------------------------------------------------------------- turn after turn


def test_a_second_turn_goes_on_with_the_statistics_of_the_first(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, modules={"mlp_out": (1, 2)})
    _, state = fit(editor, EDITS[:3])
    found, after = fit(editor, EDITS[1:], state)
    first, second = rows_of(editor, EDITS[:3]), rows_of(editor, EDITS[1:])
    everything = [*first.values(), *second.values()]
    assert after.values["rows"] == {"256x64": sum(len(h) for h, _ in everything)}
    for name, pair in second.items():
        expected = primal(pair, everything, 1e-3, 1.0)
        assert near(found[name], expected, 5e-3)
        # The statistics of its own turn alone would give another change.
        assert not near(primal(pair, list(second.values()), 1e-3, 1.0), expected, 0.05)


def test_a_state_saved_and_read_again_goes_on_bit_for_bit(corpus_path: Path, tmp_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    _, state = fit(editor, EDITS[:2])
    save_tensors(tmp_path / "state.safetensors", state.tensors, state.values)
    read = State(*load_tensors(tmp_path / "state.safetensors"))
    (one, one_state), (other, other_state) = (fit(editor, EDITS[2:], given) for given in (state, read))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one_state.values == other_state.values
    assert all(torch.equal(tensor, other_state.tensors[name]) for name, tensor in one_state.tensors.items())
