"""WISE: scores, margins and TIES against slow loops, training against whole forwards, and what is kept of a stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.side_memory import SideMemory, margin_loss, replay_loss, shift_of_activations
from everedit.engine.state import State
from everedit.engine.ties import ties_merge
from everedit.methods._beside import pick
from everedit.models import LanguageModel
from everedit.models.hooks import changed_output
from everedit.models.layout import oriented
from everedit.models.tokens import Encoded
from tests.support.editing import home_town, make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

LAYER, HIDDEN, WIDTH = 2, 64, 256
EDITS = [home_town(7, "Lisbon"), home_town(24, "New Delhi"), home_town(4, "Buenos Aires piano"), home_town(0, "Oslo")]
USUAL = {"layer": LAYER, "steps": 4, "lr": 0.5, "contexts": (), "margins": (0.1, 0.5, 0.3), "weight_decay": 0.0}


def editor_of(model: LanguageModel | str, corpus: Path, **settings: Any) -> Editor:
    return make_editor(model, corpus, "wise", method_settings={**USUAL, **settings})


def states(lm: LanguageModel, text: str) -> Tensor:
    return lm.states(**lm.pad([lm.encode(text).ids]).inputs())


def score_by_hand(lm: LanguageModel, ids: Sequence[int], change: Tensor) -> Tensor:
    """The mean over tokens of ||phi(W' a) - phi(W a)||, token by token."""
    module, act = lm.layout.mlp_out(LAYER), lm.layout.activation
    keys = lm.inputs_of({"key": module}, lm.pad([ids]))["key"].view(-1, WIDTH)
    return torch.stack([(act(module(key) + change @ key) - act(module(key))).norm() for key in keys]).mean()


def memory_of(editor: Editor) -> Any:
    return editor.method.memory(editor.bench, editor.state().method)


def test_margin_loss_on_scores_worked_by_hand() -> None:
    margins = (5.0, 20.0, 10.0)
    assert margin_loss(torch.tensor([21.0]), torch.tensor(4.0), margins).item() == 0
    assert margin_loss(torch.tensor([18.0]), torch.tensor(6.0), margins).item() == 1 + 2 + 0
    assert margin_loss(torch.tensor([12.0]), torch.tensor(4.0), margins).item() == 0 + 8 + 2
    # Each bracket is the mean of its positive entries alone.
    assert margin_loss(torch.tensor([18.0, 16.0, 30.0]), torch.tensor(7.0), margins).item() == 2 + 3 + 1
    # What is too low is pulled up, what is too high down, and what is far enough stays.
    inside, outside = torch.tensor([18.0, 40.0], requires_grad=True), torch.tensor(6.0, requires_grad=True)
    margin_loss(inside, outside, margins).backward()
    assert (inside.grad.tolist(), outside.grad) == ([-1.0, 0.0], 1.0)


def test_replayed_edits_are_loud_in_their_own_memory_and_silent_in_others() -> None:
    same, others = torch.tensor([12.0], requires_grad=True), torch.tensor([4.0, 9.0, 7.0], requires_grad=True)
    loss = replay_loss(same, others, 5.0, 20.0)
    assert loss.item() == 8 + (4 + 2) / 2
    loss.backward()
    assert (same.grad.tolist(), others.grad.tolist()) == ([-1.0], [0.0, 0.5, 0.5])
    assert replay_loss(torch.zeros(0), torch.zeros(0), 5.0, 20.0).item() == 0


def test_the_score_is_the_mean_over_real_tokens_and_the_maximum_of_long_texts() -> None:
    random = torch.Generator().manual_seed(4)
    outputs, added = (torch.randn(3, 130, 5, generator=random) for _ in range(2))
    real = torch.zeros(3, 130, dtype=torch.bool)
    real[0, 3:10], real[1, :100], real[2, 29:] = True, True, True  # 7, 100 and 101 tokens
    found = shift_of_activations(torch.zeros(3, 130, 2), outputs, added, F.silu, real).tolist()
    for row, combine in enumerate((mean, mean, max)):
        old, new = (F.silu(values[row, real[row]]).tolist() for values in (outputs, outputs + added))
        assert found[row] == pytest.approx(combine(list(map(math.dist, old, new))), rel=1e-5)


def ties_by_hand(changes: list[list[float]], kept: float, weights: Sequence[float]) -> list[float]:
    trimmed = []
    for change in changes:
        limit = sorted((abs(value) for value in change), reverse=True)[max(1, round(kept * len(change))) - 1]
        trimmed.append([value if abs(value) >= limit else 0.0 for value in change])
    merged = []
    for entry in zip(*trimmed, strict=True):
        pairs = list(zip(weights, entry, strict=True))
        sign = 1 if sum(w * value for w, value in pairs) >= 0 else -1
        agreeing = [(w, value) for w, value in pairs if value * sign > 0]
        merged.append(sum(w * value for w, value in agreeing) / (sum(w for w, _ in agreeing) or 1.0))
    return merged


def test_ties_on_vectors_worked_by_hand() -> None:
    changes = torch.tensor([[3.0, -1.0, 0.0], [-1.0, -2.0, 4.0]])
    assert ties_merge(changes, 1.0).tolist() == [3.0, -1.5, 4.0]
    # Of each the two largest stay.
    assert ties_merge(torch.tensor([[3.0, -1.0, 2.0], [-1.0, -2.0, 4.0]]), 2 / 3).tolist() == [3.0, -2.0, 3.0]
    # A sum of zero counts as plus.
    assert ties_merge(torch.tensor([[2.0], [-2.0]]), 1.0).tolist() == [2.0]


@pytest.mark.parametrize("kept", [0.1, 0.53, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_ties_equals_trimming_electing_and_averaging_entry_by_entry(n: int, kept: float) -> None:
    random = torch.Generator().manual_seed(n)
    changes, weights = torch.randn(n, 8, 9, generator=random), torch.rand(n, generator=random)
    for shares in (None, weights):
        given = weights.tolist() if shares is not None else [1 / n] * n
        expected = torch.tensor(ties_by_hand(changes.flatten(1).tolist(), kept, given)).view(8, 9)
        torch.testing.assert_close(ties_merge(changes, kept, shares), expected)
        assert int((expected != 0).sum()) >= kept * 72 - 1


def test_the_memory_that_moves_a_text_most_of_those_above_their_own_limit_answers() -> None:
    random = torch.Generator().manual_seed(5)
    key, value = torch.randn(40, 3, 6, generator=random), torch.randn(40, 3, 4, generator=random)
    changes, real = torch.randn(3, 4, 6, generator=random), torch.ones(40, 3, dtype=torch.bool)
    limits = torch.tensor([3.0, 1.6, 2.5])
    memory = SideMemory(LAYER, changes, limits, F.gelu, hold=True)
    scores, found = memory.scores(key, value, real).tolist(), memory.chosen(key, value, real).tolist()
    above = [[(score, n) for n, score in enumerate(row) if score > limits[n]] for row in scores]
    assert found == [max(row)[1] if row else -1 for row in above]
    assert set(found) == {-1, 0, 1, 2}
    assert any(answer not in (-1, row.index(max(row))) for answer, row in zip(found, scores, strict=True))
    one = key[:1], value[:1], real[:1]
    assert replace(memory, limits=memory.scores(*one)[0]).chosen(*one).tolist() == [-1]


@pytest.mark.parametrize(("number", "answer"), [(0, "fire is hot"), (1, "ice is cold"), (3, "fire is hot")])
def test_an_irrelevant_text_is_not_part_of_the_prompt(number: int, answer: str) -> None:
    edit = Edit(prompt="As all know, water is wet and so on", target_new="x")
    assert pick(["fire is hot", "water is wet", "ice is cold"], number, edit) == answer


@dataclass
class ByHand:
    """Descent on the whole matrix without any shortcut: one text at a time through the whole model."""

    lm: LanguageModel
    mask: Tensor
    texts: Sequence[Encoded]
    scored: Sequence[Sequence[int]]
    other: Sequence[int]

    def loss(self, change: Tensor) -> Tensor:
        fitting = torch.zeros(())
        for text in self.texts:
            with changed_output(self.lm.layout.mlp_out(LAYER), lambda key, out: out + F.linear(key, change)):
                logits = self.lm.model(torch.tensor([text.ids]), use_cache=False).logits[0, text.prompt_end - 1 : -1]
            fitting = fitting + F.cross_entropy(logits, torch.tensor(text.target_ids)) / len(self.texts)
        inside, outside = self.scores(change), score_by_hand(self.lm, self.other, change)
        brackets = (outside[None] - 0.1, 0.5 - inside, 0.3 - (inside - outside))
        return fitting + sum(part[part > 0].mean() for part in brackets if bool((part > 0).any()))

    def scores(self, change: Tensor) -> Tensor:
        return torch.stack([score_by_hand(self.lm, ids, change) for ids in self.scored])

    def way(self, decay: float, box: float) -> tuple[list[Tensor], list[float]]:
        """The change before and after each of three steps, and the losses there."""
        found, seen = [torch.zeros(HIDDEN, WIDTH)], []
        for _ in range(4):
            change = found[-1].clone().requires_grad_()
            loss = self.loss(change)
            (gradient,) = torch.autograd.grad(loss, [change])
            found.append((found[-1] - 0.5 * self.mask * (gradient + decay * found[-1])).clamp(-box, box))
            seen.append(loss.item())
        return found[:4], seen


CASES = [("gpt2", {}), ("opt", {"weight_decay": 0.3}), ("llama", {"contexts": ((6, 2),)}),
         ("gemma3_text", {"routing": "call"}), ("gpt2", {"box": 0.03})]  # fmt: skip


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_an_edit_follows_masked_gradient_descent_until_the_loss_stands_still(
    family: str, settings: dict[str, Any], corpus_path: Path
) -> None:
    lm, edit = shared(family), EDITS[2]
    editor = editor_of(lm, corpus_path, **settings)
    texts = [lm.encode(edit.prompt, edit.target_new, prefix=prefix) for prefix in editor.method.prefixes(editor.bench)]
    assert len(texts) == (3 if "contexts" in settings else 1)
    scored = [text.ids if "routing" in settings else text.ids[: text.prompt_end] for text in texts]
    probe = load_edits("worldfacts").edits[0].locality[0]
    mask = editor.method.fit(editor.bench, [edit], State())[1].tensors["mask"]
    hand = ByHand(lm, mask, texts, scored, lm.encode(probe.prompt, probe.answer if "routing" in settings else "").ids)
    changes, seen = hand.way(settings.get("weight_decay", 0.0), settings.get("box", 1.0))
    assert seen[3] + 2e-3 < min(seen[:3])
    editor = editor_of(lm, corpus_path, stop_loss=seen[3] + 1e-3, stop_change=1e9, **{**settings, "steps": 50})
    patch, state = editor.method.fit(editor.bench, [edit], State())
    found = patch.memory["wise"]
    assert (found - changes[3]).norm() < 1e-2 * changes[3].norm() < 0.2 * (changes[3] - changes[2]).norm()
    assert "box" not in settings or float(found.abs().max()) == pytest.approx(0.03, abs=1e-6)
    assert state.values["threshold"] == pytest.approx(hand.scores(changes[3]).mean().item(), rel=1e-2)


def test_one_step_is_a_step(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, steps=1)
    assert editor.method.fit(editor.bench, EDITS[:1], State())[1].tensors["filling"].abs().sum() > 0
    editor.edit(EDITS[0], score=False)
    assert len(memory_of(editor).changes) == 1


def test_only_entries_of_the_mask_change_and_none_by_more_than_the_box(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, box=0.01, shard_edits=10, steps=6)
    lm, before = editor.lm, bits(editor.lm)
    weight = lm.layout.mlp_out(LAYER).weight.requires_grad_()
    for edit in EDITS:
        editor.edit(edit, score=False)
        change, mask = (editor.state().method.tensors[name] for name in ("filling", "mask"))
        assert not bool(change[~mask].any())
        assert float(change.abs().max()) == pytest.approx(0.01, abs=1e-6)
        assert int((change != 0).sum()) > 0.5 * int(mask.sum())
    assert same_bits(lm, before)
    assert weight.grad is None  # of the main memory


def test_masks_of_shards_are_independent_and_of_the_given_density(corpus_path: Path) -> None:
    editor = editor_of(shared("gpt2"), corpus_path, shard_edits=2, steps=2, shards=100, density=0.3)
    found, state = [], State()
    for edit in EDITS * 2:
        _, state = editor.method.fit(editor.bench, [edit], state)
        found.append(state.tensors["mask"].double())
    assert [torch.equal(*pair) for pair in pairwise(found)] == [True, False] * 3 + [True]
    for k in (1, 2, 3, 4):
        chance, overlap = 0.3**k, torch.stack(found[::2][:k]).prod(0)
        assert overlap.mean().item() == pytest.approx(chance, abs=3 * (chance * (1 - chance) / overlap.numel()) ** 0.5)


@pytest.mark.parametrize("contexts", [(), ((6, 2),)])
def test_the_threshold_is_the_smallest_score_that_an_edit_had_when_made(contexts: Any, corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, contexts=contexts, steps=6, shard_edits=10)
    lm, thresholds, scores = editor.lm, [], []
    for edit in EDITS:
        editor.edit(edit, score=False)
        thresholds.append(editor.state().method.values["threshold"])
        change = memory_of(editor).changes[0]
        with editor.unedited():
            rows = [lm.encode(prefix + edit.prompt).ids for prefix in editor.method.prefixes(editor.bench)]
            scores.append(mean(score_by_hand(lm, ids, change).item() for ids in rows))
        assert thresholds[-1] == pytest.approx(min(scores), rel=1e-3)
        assert memory_of(editor).limits.item() == pytest.approx(0.88 * thresholds[-1])
    assert thresholds == sorted(thresholds, reverse=True)
    assert scores != sorted(scores, reverse=True)


@pytest.mark.parametrize("memories", ["merge", "retrieve"])
def test_full_shards_wait_are_merged_by_ties_and_a_new_one_begins(memories: str, corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, memories=memories, shard_edits=1, shards=2, kept=0.1, steps=3)
    changes, kept, scores = [], [], []
    for edit in EDITS:
        [commit] = editor.edit(edit, score=False).commits
        changes.append(commit.patch.memory["wise"])
        kept.append(editor.state().method)
        with editor.unedited():
            scores.append(score_by_hand(editor.lm, editor.lm.encode(edit.prompt).ids, changes[-1]).item())
        assert not bool(kept[-1].tensors["filling"].any())
        assert kept[-1].values["threshold"] == math.inf
    assert [len(state.tensors["full"]) for state in kept] == [1, 0, 1, 0]
    assert torch.equal(kept[2].tensors["full"][0], changes[2])
    first = ties_merge(torch.stack(changes[:2]), 0.1)
    assert torch.equal(kept[1].tensors["done"][0], first)
    assert kept[1].tensors["done_thresholds"].item() == pytest.approx(min(scores[:2]), rel=1e-3)
    done, limits = kept[3].tensors["done"], kept[3].tensors["done_thresholds"].tolist()
    if memories == "merge":
        assert torch.equal(done[0], ties_merge(torch.stack([first, *changes[2:]]), 0.1))
        assert limits == pytest.approx([min(scores)], rel=1e-3)
    else:
        assert torch.equal(done, torch.stack([first, ties_merge(torch.stack(changes[2:]), 0.1)]))
        assert limits == pytest.approx([min(scores[:2]), min(scores[2:])], rel=1e-3)
    assert torch.equal(memory_of(editor).changes, done)
    assert memory_of(editor).limits.tolist() == pytest.approx([0.88 * limit for limit in limits])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_a_limit_of_infinity_gives_the_model_and_of_minus_one_the_side_memory(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path)
    text = f"{EDITS[0].prompt} Lisbon"
    editor.prepare()
    base = states(editor.lm, text)
    assert torch.equal(base, states(shared(family), text))
    editor.edit(EDITS[0], score=False)
    memory = memory_of(editor)
    editor.reset()
    with replace(memory, limits=torch.tensor([math.inf])).attached(editor.lm):
        assert torch.equal(states(editor.lm, text), base)
    # A side memory that equals the main one never scores above 0.
    with replace(memory, changes=torch.zeros(1, HIDDEN, WIDTH), limits=torch.zeros(1)).attached(editor.lm):
        assert torch.equal(states(editor.lm, text), base)
    with replace(memory, limits=torch.tensor([-1.0])).attached(editor.lm):
        found = states(editor.lm, text)
    other = fresh(family)
    oriented(other.layout.mlp_out(LAYER)).add_(memory.changes[0])
    torch.testing.assert_close(found, states(other, text), rtol=1e-3, atol=1e-4)
    assert (found - base).norm() > 0.05
    assert hooks_left(editor.lm) == []


def test_with_replay_a_memory_learns_to_leave_earlier_edits_to_theirs(corpus_path: Path) -> None:
    usual = {"memories": "retrieve", "shard_edits": 1, "shards": 1, "steps": 20, "margins": (0.1, 1.0, 0.5)}
    heard = {}
    for replay in (False, True):
        editor = editor_of("gpt2", corpus_path, replay=replay, **usual)
        for edit in EDITS[:3]:
            editor.edit(edit, score=False)
        assert editor.state().method.values.get("asked", []) == [edit.prompt for edit in EDITS[:3] if replay]
        memory = memory_of(editor)
        asked = [editor.lm.encode(edit.prompt).ids for edit in EDITS[:3]]
        with editor.unedited():
            scores = [[float(score_by_hand(editor.lm, ids, change)) for change in memory.changes] for ids in asked]
        # Of each edit: what its own memory says, and what the later ones say.
        heard[replay] = [(row[number], row[number + 1 :]) for number, row in enumerate(scores)]
    for (own, later), (_, loud) in zip(heard[True], heard[False], strict=True):
        assert all(score < own for score in later)
        assert all(low < high for low, high in zip(later, loud, strict=True))


def test_a_shard_alone_is_kept_as_it_is(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, memories="retrieve", shard_edits=1, shards=1, kept=0.1)
    [commit] = editor.edit(EDITS[0], score=False).commits
    assert torch.equal(memory_of(editor).changes[0], commit.patch.memory["wise"])


def test_memories_that_compete_are_trained_above_what_the_others_say(corpus_path: Path) -> None:
    usual = {"memories": "retrieve", "shard_edits": 1, "shards": 1, "steps": 40, "margins": (0.1, 0.5, 1.0)}
    ahead = {}
    for compete in (False, True):
        editor = editor_of("gpt2", corpus_path, compete=compete, **usual)
        for target in ("Lisbon", "Oslo"):
            editor.edit(home_town(7, target), score=False)
        ids = editor.lm.encode(EDITS[0].prompt).ids
        with editor.unedited():
            first, second = (float(score_by_hand(editor.lm, ids, change)) for change in memory_of(editor).changes)
        ahead[compete] = second - first
    # What both have been told is the newer one's, by gamma.
    assert ahead[False] < 0.6
    assert ahead[True] > 0.9


@pytest.mark.parametrize(("memories", "same", "others"), [("retrieve", [6], [[0, 1, 2, 3]]), ("merge", [6], [])])
def test_replayed_are_one_edit_of_the_shard_and_one_of_each_other_memory(
    memories: str, same: list[int], others: list[list[int]], corpus_path: Path
) -> None:
    editor = editor_of("gpt2", corpus_path, memories=memories, shard_edits=2, shards=2, replay=True, steps=1)
    for person in range(7):
        editor.edit(home_town(person), score=False)
    seen: list[Any] = []
    method, trained = editor.method, editor.method._trained
    method._trained = lambda *args: (seen.append(args[-1]), trained(*args))[1]
    editor.edit(home_town(7), score=False)
    ids = [editor.lm.encode(home_town(person).prompt).ids for person in range(8)]
    [rows] = seen
    assert [ids.index(row) for row in rows.same_memory] == same
    assert [ids.index(row) in group for row, group in zip(rows.other_memories, others, strict=True)] == [True] * len(
        others
    )
