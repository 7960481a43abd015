"""Fine-tuning is the plain training loop that its papers describe, run here again with whole forward passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.state import State
from everedit.errors import NumericalError
from everedit.experiments.folder import RunFolder
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from tests.support import facts
from tests.support.editing import home_town, make_editor
from tests.support.loading import bits, edit_of, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "gptj", "gemma2", "opt", "llama"]  # gpt2's weights are stored transposed (Conv1D)
OBJECTIVE = {"ft": "prompt_last", "ft-l": "prompt_last", "ft-m": "target_new"}
# Prompts of different lengths, and targets of two, one and three tokens, so that the means do not coincide.
EDITS = [home_town(17, "New Delhi"), home_town(10, "Lisbon"), home_town(0, "Buenos Aires piano")]
ONE_TOKEN = [home_town(17, "Lima"), home_town(10, "Lisbon"), home_town(0, "Oslo")]
STREAM = [home_town(person) for person in (0, 10, 20, 30)]
LAYER, STEPS, BOX = 1, 6, 0.02


def editor_of(model: LanguageModel | str, corpus: Path, method: str = "ft", **settings: Any) -> Editor:
    chosen = {"layers": (LAYER,), "lr": 1e-2, "steps": STEPS, "stop_loss": 0.0, **settings}
    return make_editor(model, corpus, method, method_settings=chosen)


def fitted(editor: Editor, edits: Sequence[Edit]) -> dict[int, Tensor]:
    """The change of each trained layer, (d_out, d_in)."""
    patch, _ = editor.method.fit(editor.bench, edits, State())
    layout = editor.lm.layout
    assert list(patch.deltas) == [layout.mlp_out_weight(layer) for layer in editor.method.layers()]
    return {layer: patch.deltas[layout.mlp_out_weight(layer)].dense() for layer in editor.method.layers()}


def changed(family: str, corpus: Path, method: str, edits: Sequence[Edit] = EDITS, **settings: Any) -> Tensor:
    """The change of the one trained layer."""
    [change] = fitted(editor_of(shared(family), corpus, method, **settings), edits).values()
    return change


def loss_of(lm: LanguageModel, edit: Edit, objective: str) -> Tensor:
    """An edit's loss by one unpadded forward of the whole model, the softmax written out."""
    prompt = lm.tokenizer(edit.prompt)["input_ids"]
    whole = lm.tokenizer(f"{edit.prompt} {edit.target_new}")["input_ids"]
    assert whole[: len(prompt)] == prompt
    target = whole[len(prompt) :]
    ids = torch.tensor([prompt if objective == "prompt_last" else whole])
    logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    places = [len(prompt) - 1 + (index if objective == "target_new" else 0) for index in range(len(target))]
    return -torch.stack([logs[place, token] for place, token in zip(places, target, strict=True)]).mean()


def loss_after(family: str, change: Tensor, edit: Edit, objective: str) -> float:
    lm = fresh(family)
    oriented(lm.layout.mlp_out(LAYER)).add_(change)
    return float(loss_of(lm, edit, objective))


@dataclass
class ByHand:
    """A training loop without any shortcut: the modules' own weights want gradients, one text runs at a time."""

    family: str
    layers: tuple[int, ...] = (LAYER,)
    objective: str = "prompt_last"
    steps: int = STEPS
    rows: int = 64
    stop: float = 0.0
    decay: float = 0.0
    box: float = math.inf
    updates: list[int] = field(default_factory=list)  # the first row of each part that made a step

    def train(self, edits: Sequence[Edit]) -> dict[int, Tensor]:
        lm = fresh(self.family)
        modules = {layer: lm.layout.mlp_out(layer) for layer in self.layers}
        weights = [module.weight.requires_grad_() for module in modules.values()]
        starts = {layer: oriented(module).clone() for layer, module in modules.items()}
        optimiser = torch.optim.Adam(weights, lr=1e-2, weight_decay=self.decay)
        for _ in range(self.steps):
            seen: list[float] = []
            for first in range(0, len(edits), self.rows):
                part = edits[first : first + self.rows]
                loss = torch.stack([loss_of(lm, edit, self.objective) for edit in part]).mean()
                seen += [loss.item()] * len(part)
                if loss >= self.stop:
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    self.updates.append(first)
                for layer, module in modules.items():
                    oriented(module).copy_(oriented(module).clamp(starts[layer] - self.box, starts[layer] + self.box))
            if sum(seen) / len(seen) < self.stop:
                break
        return {layer: oriented(module) - starts[layer] for layer, module in modules.items()}


def require_same(found: dict[int, Tensor], expected: dict[int, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for layer, change in expected.items():
        assert change.norm() > 1
        assert (found[layer] - change).norm() < 2e-3 * change.norm()


@pytest.mark.parametrize("rows", [64, 2])
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("method", ["ft", "ft-m"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_plain_training(family: str, method: str, layers: tuple[int, ...], rows: int, corpus_path: Path) -> None:
    found = fitted(editor_of(shared(family), corpus_path, method, layers=layers, rows_a_step=rows), EDITS)
    require_same(found, ByHand(family, layers, OBJECTIVE[method], rows=rows).train(EDITS))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("method", "stop"), [("ft-l", 2.1), ("ft-m", 0.8)])
def test_box_decay_and_stop_are_those_of_plain_training(
    method: str, stop: float, family: str, corpus_path: Path
) -> None:
    # Adam does not feel the size of a loss; the decay and the stop do. Parts below the stop make no step.
    settings = {"box": BOX, "weight_decay": 0.02, "stop_loss": stop, "steps": 30, "layers": (0, 2), "rows_a_step": 2}
    found = fitted(editor_of(shared(family), corpus_path, method, **settings), EDITS)
    hand = ByHand(family, (0, 2), OBJECTIVE[method], 30, rows=2, stop=stop, decay=0.02, box=BOX)
    require_same(found, hand.train(EDITS))
    assert 1 < hand.updates.count(0) <= hand.updates.count(2) < 30


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_below_the_trained_layers_runs_once(family: str, corpus_path: Path) -> None:
    lm = shared(family)
    assert lm.blocks_return_tuples in (True, False)  # asked of the model once in its life, by a run of its own
    runs: list[int] = []
    handles = [
        lm.layout.mlp_out(layer).register_forward_hook(lambda *_, layer=layer: runs.append(layer)) for layer in range(4)
    ]
    fitted(editor_of(lm, corpus_path, layers=(2, 3), rows_a_step=2), EDITS)
    for handle in handles:
        handle.remove()
    assert [runs.count(layer) for layer in range(4)] == [2, 2, 2 * STEPS, 2 * STEPS]


def test_steps_too_small_for_the_models_dtype_are_not_lost(corpus_path: Path) -> None:
    lm = fresh("llama", "bfloat16")
    [change] = fitted(editor_of(lm, corpus_path, lr=1e-5, steps=1), EDITS[:1]).values()
    weight = oriented(lm.layout.mlp_out(LAYER))
    # Adam's first step has the learning rate's size; rounded to bfloat16 almost none of these weights would move.
    assert change.dtype == torch.float32
    assert float((change.abs() - 1e-5).abs().median()) < 1e-7
    assert float(((weight + change).bfloat16() == weight).float().mean()) > 0.8


@pytest.mark.parametrize("family", FAMILIES)
def test_for_one_target_token_both_objectives_are_the_same(family: str, corpus_path: Path) -> None:
    last, new = (changed(family, corpus_path, method, ONE_TOKEN, weight_decay=0.02) for method in ("ft", "ft-m"))
    assert last.norm() > 1
    assert torch.equal(last, new)
    last, new = (changed(family, corpus_path, method, EDITS[:1]) for method in ("ft", "ft-m"))
    assert (last - new).norm() > 0.1 * last.norm()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_tokens_that_share_a_place_cost_at_least_log_two(family: str, corpus_path: Path) -> None:
    edit = EDITS[0]
    after = {
        steps: loss_after(family, changed(family, corpus_path, "ft", [edit], steps=steps), edit, "prompt_last")
        for steps in (1, 5, 60)
    }
    assert all(loss > math.log(2) - 1e-5 for loss in after.values())
    assert after[1] > after[5] > after[60]
    assert after[60] < math.log(2) + 0.2
    # A stop below that is never met, one above it is; each at its own place, the tokens can be learnt.
    never, met = (changed(family, corpus_path, "ft", [edit], steps=60, stop_loss=stop) for stop in (0.69, 1.0))
    assert torch.equal(never, changed(family, corpus_path, "ft", [edit], steps=60))
    assert not torch.equal(met, never)
    assert loss_after(family, changed(family, corpus_path, "ft-m", [edit], steps=60), edit, "target_new") < 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_stops_when_the_loss_is_small(family: str, corpus_path: Path) -> None:
    edit, hand = ONE_TOKEN[0], ByHand(family, objective="target_new", steps=60, stop=0.05)
    hand.train([edit])
    needed = len(hand.updates)
    assert 2 < needed < 60
    long, enough, short = (
        changed(family, corpus_path, "ft-m", [edit], stop_loss=0.05, steps=steps) for steps in (60, needed, needed - 1)
    )
    assert torch.equal(long, enough)
    assert not torch.equal(long, short)
    assert loss_after(family, long, edit, "target_new") < 0.05 <= loss_after(family, short, edit, "target_new")
    # What the model knows already needs no step at all.
    fact = facts.facts()[0]
    assert not changed(family, corpus_path, "ft-m", [edit_of(fact, fact.answer)], stop_loss=1.0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_box_holds_after_every_step(family: str, corpus_path: Path) -> None:
    ulp = torch.finfo(torch.float32).eps * float(oriented(shared(family).layout.mlp_out(LAYER)).abs().max())
    for steps in range(1, 6):
        change = changed(family, corpus_path, "ft-l", EDITS[:1], steps=steps, box=0.015)
        assert float(change.abs().max()) <= 0.015 + ulp
        # From the second step on, a hundredth each, there is something to hold back.
        assert bool((change.abs() > 0.015 - ulp).any()) == (steps > 1)
    free = changed(family, corpus_path, "ft", EDITS[:1], steps=5)
    assert float(free.abs().max()) > 0.03


def test_a_box_of_no_width_changes_nothing_and_a_huge_one_is_none(corpus_path: Path) -> None:
    for family in FAMILIES:
        free = changed(family, corpus_path, "ft")
        assert not changed(family, corpus_path, "ft-l", box=0.0).any()
        for radius in (1e6, math.inf):
            assert torch.equal(changed(family, corpus_path, "ft-l", box=radius), free)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("around", ["edit", "stream"])
def test_a_box_around_the_stream_holds_all_of_it(around: str, family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, "ft-l", box=BOX, box_around=around)
    weight = oriented(editor.lm.layout.mlp_out(LAYER))
    last = start = weight.clone()
    steps, drift = [], []
    for _ in editor.stream(STREAM):
        steps.append(float((weight - last).abs().max()))
        drift.append(float((weight - start).abs().max()))
        last = weight.clone()
    assert min(steps) > 0.5 * BOX
    kept = editor.state().method.tensors
    if around == "stream":
        assert max(drift) <= BOX + 1e-6
        assert kept.keys() == {f"start|{LAYER}"}
        assert torch.equal(kept[f"start|{LAYER}"], start)
    else:
        assert max(steps) <= BOX + 1e-6
        assert drift[-1] > 1.5 * BOX
        assert kept == {}


def test_the_box_around_a_stream_holds_in_a_narrow_dtype_too(corpus_path: Path) -> None:
    lm, radius = fresh("llama", "bfloat16"), 5e-4
    start = oriented(lm.layout.mlp_out(LAYER)).float().clone()
    editor = editor_of(lm, corpus_path, "ft-l", lr=1e-4, box=radius, box_around="stream")
    for _ in editor.stream(STREAM):
        # The stream adds up in float32, and the model shows that rounded: what adds up is to stay in the box.
        [master] = editor.state().weights.masters.values()
        assert 0 < float((master - start).abs().max()) <= radius + 1e-6


def test_the_box_around_a_stream_survives_an_interruption(tmp_path: Path, corpus_path: Path) -> None:
    settings: dict[str, Any] = {"box": BOX, "box_around": "stream"}
    whole, before, after = (editor_of("gpt2", corpus_path, "ft-l", **settings) for _ in range(3))
    list(whole.stream(STREAM))
    list(before.stream(STREAM[:2]))
    RunFolder(tmp_path).save_state(before.state(), 2)
    after.load_state(RunFolder(tmp_path).load_state(after.lm.device)[0])
    list(after.stream(STREAM[2:]))
    assert same_bits(after.lm, bits(whole.lm))


def traces(lm: LanguageModel) -> list[Any]:
    """What training could leave behind in a model, apart from its bits."""
    flags = [(name, weight.requires_grad, weight.grad) for name, weight in lm.model.named_parameters()]
    return [flags, hooks_left(lm), [module.training for module in lm.model.modules()]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["ft", "ft-l", "ft-m"])
def test_only_the_listed_weights_change_and_only_by_a_commit(method: str, family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, method, layers=(0, 2))
    lm = editor.lm
    before, left = bits(lm), traces(lm)
    fitted(editor, EDITS)
    assert same_bits(lm, before)
    assert traces(lm) == left
    editor.edit(EDITS, score=False)
    now = lm.model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(now[name], tensor)}
    assert moved == {lm.layout.mlp_out_weight(0), lm.layout.mlp_out_weight(2)}
    assert traces(lm) == left
    editor.reset()
    assert same_bits(lm, before)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, lr=1e37, box=1e38, box_around="stream")
    before, left = bits(editor.lm), traces(editor.lm)
    with pytest.raises(NumericalError, match=r"(?s)loss that is not finite.*lower the learning rate"):
        editor.edit(EDITS, score=False)
    assert same_bits(editor.lm, before)
    assert traces(editor.lm) == left
    assert editor.state().method == State()
    assert editor.norm_ratios() == {}
