"""GRACE: the code book grows by the paper's three rules, and values stand in at a prompt's own last token alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import dist
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.state import State
from everedit.methods import grace
from everedit.models import LanguageModel
from everedit.models.hooks import capture, changed_output
from everedit.models.tokens import Batch
from tests.support import facts
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, edit_of, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["llama", "gpt2", "opt", "gemma3_text"]
LAYER = 1
PLACES = [*((family, "last") for family in FAMILIES), ("opt", "prompt"), ("llama", "all")]
EDITS = [home_town(7, "Lisbon"), home_town(4, "Lima"), home_town(24, "New Delhi")]
UNSEEN = [home_town(person).prompt for person in (1, 2, 3)]
TARGETS = ["Oslo", "Lima", "Buenos Aires", "Buenos Aires piano"]  # the third one is the beginning of the fourth
Point = tuple[float, float]


def editor_of(model: LanguageModel | str, corpus: Path, **settings: Any) -> Editor:
    return make_editor(model, corpus, "grace", method_settings={"layer": LAYER, "steps": 3, "lr": 0.2, **settings})


def states(lm: LanguageModel, prompts: Sequence[str]) -> Tensor:
    return lm.states(**lm.pad([lm.encode(prompt).ids for prompt in prompts]).inputs())


def mlp_outputs(lm: LanguageModel, batch: Batch) -> Tensor:
    with capture(outputs={"out": lm.layout.mlp_out(LAYER)}, rows=len(batch)) as seen:
        lm.states(**batch.inputs())
    return seen["out"]


def last_key(lm: LanguageModel, prompt: str) -> Tensor:
    return lm.inputs_of({"key": lm.layout.mlp_out(LAYER)}, lm.pad([lm.encode(prompt).ids]))["key"][0, -1]


def with_tensors(editor: Editor, **tensors: Tensor) -> None:
    now = editor.state()
    editor.load_state(replace(now, method=State({**now.method.tensors, **tensors})))


def book_of(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, points: Sequence[Point], targets: Sequence[str], **settings: Any
) -> list[dict[str, Tensor]]:
    """The code book after each edit, with points of the plane in the place of a model's keys."""
    prescribed = iter(points)

    def key_and_output(tail: Any, text: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor(next(prescribed)), torch.zeros(tail.lm.layout.hidden_size)

    monkeypatch.setattr(grace, "_at_prompt_end", key_and_output)
    editor, state, found = editor_of(shared("gpt2"), corpus, steps=1, **settings), State(), []
    for target in targets:
        _, state = editor.method.fit(editor.bench, [home_town(0, target)], state)
        assert state.values["entries"] == len(state.tensors["keys"])
        found.append(state.tensors)
    return found


def rules_by_hand(points: Sequence[Point], targets: Sequence[str], moving: bool) -> tuple[list[Any], ...]:
    """Keys, radii (new ones of 1), labels and the branches taken, one edit after another in Python's own numbers."""
    keys, radii, labels, branches = [points[0]], [1.0], [targets[0]], ["add"]
    for point, target in zip(points[1:], targets[1:], strict=True):
        distance, near = min((dist(key, point), entry) for entry, key in enumerate(keys))
        if distance <= 1 + radii[near] and labels[near] == target:
            branches.append("wider" if distance > radii[near] else "expand")
            radii[near] = max(radii[near], distance)
            if moving:
                keys[near] = ((keys[near][0] + point[0]) / 2, (keys[near][1] + point[1]) / 2)
            continue
        conflict = distance <= 1 + radii[near]
        branches.append("split" if conflict else "add")
        radii[near] = distance / 2 - 1e-5 if conflict else radii[near]
        keys, radii, labels = [*keys, point], [*radii, distance / 2 if conflict else 1.0], [*labels, target]
    return keys, radii, labels, branches


@pytest.mark.parametrize("moving", [False, True])
def test_the_code_book_grows_as_the_rules_by_hand_say(
    moving: bool, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = random.Random(5)
    points = [(order.uniform(0, 7), order.uniform(0, 7)) for _ in range(60)]
    targets = [order.choice(TARGETS) for _ in points]
    settings = {"expand": "moving_average"} if moving else {}
    *_, book = book_of(corpus_path, monkeypatch, points, targets, **settings)
    keys, radii, labels, branches = rules_by_hand(points, targets, moving)
    assert all(branches.count(branch) >= 5 for branch in ("add", "expand", "wider", "split"))
    torch.testing.assert_close(book["keys"], torch.tensor(keys))
    torch.testing.assert_close(book["radii"], torch.tensor(radii))
    ids = [list(shared("gpt2").encode(EDITS[0].prompt, label).target_ids) for label in labels]
    assert len(set(map(len, ids))) == 3
    assert [[token for token in row if token >= 0] for row in book["labels"].tolist()] == ids
    asked = [(order.uniform(0, 7), order.uniform(0, 7)) for _ in range(200)]
    near = [min((dist(key, point), entry) for entry, key in enumerate(keys)) for point in asked]
    expected = [entry if distance <= radii[entry] else -1 for distance, entry in near]
    assert grace.CodeBook(LAYER, **book).chosen(torch.tensor(asked)).tolist() == expected
    assert 20 < expected.count(-1) < 180


@pytest.mark.parametrize(
    ("third", "radii"),
    [
        ((2.0, 0.0), [0.75 - 1e-5, 0.25 - 1e-5, 0.25]),  # next to B: another split
        ((0.3, 0.0), [0.75 - 1e-5, 0.75]),  # inside A's ball
        ((0.0, 1.2), [1.2, 0.75]),  # nearest to A, but outside
        ((-9.0, 0.0), [0.75 - 1e-5, 0.75, 1.0]),  # far from both
    ],
)
def test_the_third_of_three_edits_with_labels_a_b_a_meets_the_label_of_its_nearest_key(
    third: Point, radii: list[float], corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    books = book_of(corpus_path, monkeypatch, [(0.0, 0.0), (1.5, 0.0), third], ["Oslo", "Lima", "Oslo"])
    assert [len(book["keys"]) for book in books] == [1, 2, len(radii)]
    torch.testing.assert_close(books[2]["radii"], torch.tensor(radii), rtol=0, atol=1e-6)
    oslo, lima = books[1]["labels"].tolist()
    assert books[2]["labels"].tolist() == [oslo, lima, oslo][: len(radii)]


def test_a_split_leaves_neither_key_in_the_others_ball(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, radius=40.0, steps=60)
    editor.edit(EDITS[:2], score=False)
    book = editor.state().method.tensors
    distance = float((book["keys"][0] - book["keys"][1]).norm())
    assert 0 < float(book["radii"].min()) <= float(book["radii"].sum()) < distance <= 80
    assert max(losses(editor.lm, EDITS[:2])) < min(losses(shared("llama"), EDITS[:2])) - 3


def test_a_near_edit_with_the_same_target_widens_the_ball_and_adds_no_entry(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, radius=1.0)
    first, second = home_town(4, "Lima"), Edit(prompt="Yes. The home town of Corin Vane", target_new="Lima")
    before, after = ((editor.edit(edit, score=False), editor.state().method.tensors)[1] for edit in (first, second))
    distance = float((last_key(editor.lm, second.prompt) - before["keys"][0]).norm())
    assert 1.0 < distance <= 2.0
    assert torch.equal(after["keys"], before["keys"])
    assert float(after["radii"]) == pytest.approx(distance, rel=1e-4)
    assert 0.2 < float((after["values"] - before["values"]).abs().max()) < 0.7


@pytest.mark.parametrize("radius", [1e30, 2.0, 1e-30])
def test_the_number_of_entries_lies_between_one_and_the_number_of_distinct_keys(
    radius: float, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = random.Random(6)
    distinct = [(order.uniform(0, 9), order.uniform(0, 9)) for _ in range(12)]
    points = [*distinct, *distinct[::2], *distinct[::3]]
    books = book_of(corpus_path, monkeypatch, points, ["Oslo"] * len(points), radius=radius)
    counts = [len(book["keys"]) for book in books]
    assert all(count <= edits for edits, count in enumerate(counts, start=1))
    assert counts[-1] in {1e30: [1], 2.0: range(2, 12), 1e-30: [12]}[radius]


def test_an_edit_of_the_same_prompt_with_another_target_takes(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, steps=60)
    editor.edit([home_town(4, "Lima"), home_town(4, "Oslo")], score=False)
    assert losses(editor.lm, [home_town(4, "Oslo")])[0] < losses(shared("gpt2"), [home_town(4, "Oslo")])[0] - 3
    memory = editor.method.memory(editor.bench, editor.state().method)
    assert memory.chosen(memory.keys[-1:]).tolist() == [len(memory.keys) - 1]


def test_no_entry_or_radii_of_zero_leave_every_bit_of_what_was_not_edited(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    lm, unseen, seen = editor.lm, states(editor.lm, UNSEEN), states(editor.lm, [EDITS[0].prompt])
    editor.prepare()
    assert torch.equal(states(lm, [EDITS[0].prompt]), seen)
    editor.edit(EDITS[0], score=False)
    assert not torch.equal(states(lm, [EDITS[0].prompt]), seen)
    with_tensors(editor, radii=torch.zeros(1))
    assert hooks_left(lm)
    assert torch.equal(states(lm, UNSEEN), unseen)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_prompts_last_token_gets_the_value_and_no_other_token_does(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path)
    lm = editor.lm
    editor.edit(EDITS, score=False)
    book = editor.state().method.tensors
    assert len(book["keys"]) == len(EDITS)
    batches = [lm.pad([lm.encode(edit.prompt).ids]) for edit in EDITS]
    assert len({batch.ids.shape for batch in batches}) == 3
    for entry, batch in enumerate(batches):
        away = last_key(lm, EDITS[entry].prompt) - book["keys"][entry]
        assert float(away.norm()) < 1e-4 < float(book["radii"][entry])
        found = mlp_outputs(lm, batch)[0]
        with editor.unedited():
            base = mlp_outputs(lm, batch)[0]
        assert torch.equal(found[-1], book["values"][entry])
        assert torch.equal(found[:-1], base[:-1])
        assert not torch.equal(found[-1], base[-1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["last", "prompt", "all"])
def test_each_row_of_a_batch_is_asked_and_answered_at_its_own_places(where: str, side: str, corpus_path: Path) -> None:
    lm = fresh("opt")
    editor = editor_of(lm, corpus_path, replace=where)
    editor.edit([EDITS[0], EDITS[2]], score=False)
    texts = [EDITS[2].prompt, UNSEEN[0], EDITS[0].prompt]
    batch = lm.pad([lm.encode(text).ids for text in texts], side=side)
    found = mlp_outputs(lm, batch)
    with editor.unedited():
        base = mlp_outputs(lm, batch)
    for row, (start, length) in enumerate(zip(batch.shift.tolist(), batch.mask.sum(1).tolist(), strict=True)):
        last = start + length - 1
        expected = {"last": [last], "prompt": range(start, last), "all": range(start, last + 1)}[where]
        assert (found[row] != base[row]).any(-1).nonzero()[:, 0].tolist() == ([] if row == 1 else list(expected))


def values_by_hand(lm: LanguageModel, edit: Edit, where: str) -> tuple[list[Tensor], list[float]]:
    """Adam's way from the layer's own output on, and the losses: whole forwards of the whole text."""
    prompt, whole = lm.encode(edit.prompt).ids, lm.encode(edit.prompt, edit.target_new).ids
    end, columns = len(prompt) - 1, torch.arange(len(whole))[:, None]
    places = {"last": columns == end, "prompt": columns < end, "all": columns >= 0}[where]
    value = mlp_outputs(lm, lm.pad([whole]))[0, end].clone().requires_grad_()
    optimiser, found, seen = torch.optim.Adam([value], lr=0.05), [value.detach().clone()], []

    def change(_: Tensor, output: Tensor) -> Tensor:
        return torch.where(places, value, output.view(len(whole), -1)).view_as(output)

    for _ in range(6):
        with changed_output(lm.layout.mlp_out(LAYER), change):
            logits = lm.model(torch.tensor([whole]), use_cache=False).logits[0, end:-1]
        loss = F.cross_entropy(logits, torch.tensor(whole[end + 1 :]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(value.detach().clone())
        seen.append(loss.item())
    return found, seen


@pytest.mark.parametrize(("family", "where"), PLACES)
def test_a_value_is_what_adam_finds_by_whole_forwards(family: str, where: str, corpus_path: Path) -> None:
    lm = shared(family)
    values, seen = values_by_hand(lm, EDITS[2], where)
    assert seen[-1] < seen[0] - 0.1
    for steps, stop in ((6, 0.0), (2, seen[2] + 1e-3)):
        editor = editor_of(lm, corpus_path, start="warm", replace=where, steps=6, lr=0.05, stop_loss=stop)
        _, state = editor.method.fit(editor.bench, [EDITS[2]], State())
        way = (values[steps] - values[0]).norm()
        assert way > 0.1
        assert (state.tensors["values"][0] - values[steps]).norm() < 1e-2 * way


def test_a_cold_value_begins_at_random_between_zero_and_one(corpus_path: Path) -> None:
    editor = editor_of(shared("gpt2"), corpus_path, steps=1, lr=1e-9)
    values = editor.method.fit(editor.bench, EDITS, State())[1].tensors["values"]
    assert -1e-6 < float(values.min()) < float(values.max()) < 1
    assert values.mean().item() == pytest.approx(0.5, abs=4 / 12**0.5 / values.numel() ** 0.5)
    assert (values[0] - values[1]).abs().mean().item() == pytest.approx(1 / 3, abs=0.12)


def test_hundreds_of_edits_change_no_weight_and_each_can_be_deleted(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, steps=1, radius=0.01)
    lm, before = editor.lm, bits(editor.lm)
    table = [edit_of(fact) for fact in facts.facts()]
    again = [edit.model_copy(update={"prompt": f"Yes. {edit.prompt}"}) for edit in table[:80]]
    asked = [edit.prompt for edit in table[:4]]
    base = states(lm, asked)
    assert len(list(editor.stream([*table, *again]))) == 200
    assert same_bits(lm, before)
    book, edited = editor.state().method.tensors, states(lm, asked)
    assert bool((edited != base).flatten(1).any(1).all())
    with_tensors(editor, **{name: torch.cat([tensor[:1], tensor[2:]]) for name, tensor in book.items()})
    now = states(lm, asked)
    assert torch.equal(now[1], base[1])
    assert torch.equal(now[[0, 2, 3]], edited[[0, 2, 3]])


def test_deleting_all_entries_gives_the_base_models_bits(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path)
    base = states(editor.lm, [EDITS[0].prompt])
    editor.edit(EDITS[0], score=False)
    assert not torch.equal(states(editor.lm, [EDITS[0].prompt]), base)
    with_tensors(editor, **{name: tensor[:0] for name, tensor in editor.state().method.tensors.items()})
    assert torch.equal(states(editor.lm, [EDITS[0].prompt]), base)
