"""Marginalia: no note, no change of a bit; notes that know nothing of each other; decided once, however it is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.margin import Book
from everedit.engine.relation import built_in_wordings
from everedit.engine.router import Route, Router
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import TokenError
from everedit.evaluation.read import read
from everedit.methods import marginalia as module
from everedit.models import LanguageModel, load_model
from everedit.models.hooks import changed_output
from everedit.models.tokens import Encoded
from tests.support import facts
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, edit_of, fresh, hooks_left, same_bits

pytestmark = pytest.mark.usefixtures("own_cache")
# Targets of one, two and three tokens, prompts of several lengths.
EDITS = [home_town(7, "Lisbon"), home_town(24, "New Delhi"), home_town(4, "Buenos Aires piano")]
OTHERS = [facts.facts()[-number].prompt for number in (1, 2, 3)]
FAMILIES = ["llama", "gpt2", "gemma3_text"]


def editor_of(model: str | LanguageModel, corpus: Path, **settings: Any) -> Editor:
    target = {"steps": 60, "clamp": 12.0, "weight_decay": 0.0}
    usual = {"layer": 2, "wordings": 0, "frames": ("{}",), "target": target}
    return make_editor(model, corpus, "marginalia", method_settings={**usual, **settings})


def logits(lm: LanguageModel, texts: Sequence[str], side: str = "right") -> list[Tensor]:
    """The logits (tokens, vocabulary) of each text, run in one batch."""
    rows = [lm.encode(text).ids for text in texts]
    batch = lm.pad(rows, side=side)
    with torch.no_grad():
        found = lm.model(**batch.inputs(), use_cache=False).logits
    return [line[mask.bool()] for line, mask in zip(found, batch.mask, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_note_the_model_is_the_base_model_to_the_bit(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path)
    before, weights = logits(editor.lm, OTHERS), bits(editor.lm)
    mixed = [EDITS[0].prompt, *OTHERS]
    beside = logits(editor.lm, mixed)
    editor.edit(EDITS, score=False)
    assert same_bits(editor.lm, weights)
    assert all(map(torch.equal, logits(editor.lm, OTHERS), before))
    # A row that is annotated changes nothing in the rows beside it.
    now = logits(editor.lm, mixed)
    assert all(map(torch.equal, now[1:], beside[1:]))
    assert not torch.equal(now[0], beside[0])
    editor.reset()
    assert all(map(torch.equal, logits(editor.lm, mixed), beside))
    assert hooks_left(editor.lm) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_note_adds_its_vector_behind_its_block_from_the_subject_on(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path)
    lm, edit = editor.lm, EDITS[1]
    editor.edit(edit, score=False)
    book = Book.of(editor.state().method)
    assert book is not None
    text = lm.encode(f"{edit.prompt}, as we know, is", subject=edit.subject)

    def by_hand(_: Tensor, output: Tensor) -> Tensor:
        moved = output.clone()
        moved[:, text.subject_last :] += book.notes[0]
        return moved

    ours = logits(lm, [text.text])[0]
    with editor.unedited(), changed_output(lm.layout.block(2), by_hand):
        theirs = logits(lm, [text.text])[0]
    torch.testing.assert_close(ours, theirs)


def test_notes_know_nothing_of_each_other(corpus_path: Path) -> None:
    prompts = [edit.prompt for edit in EDITS]
    alone = {}
    for edit in EDITS:
        editor = editor_of("llama", corpus_path)
        editor.edit(edit, score=False)
        alone[edit.prompt] = logits(editor.lm, [edit.prompt])[0]
    for order in (EDITS[::-1], [EDITS[1], EDITS[2], EDITS[0]]):
        editor = editor_of("llama", corpus_path)
        for edit in order:
            editor.edit(edit, score=False)
        for prompt in prompts:
            assert torch.equal(logits(editor.lm, [prompt])[0], alone[prompt])


def test_a_book_is_the_union_of_its_parts(corpus_path: Path) -> None:
    books = []
    for part in (EDITS[:2], EDITS[2:], EDITS):
        editor = editor_of("llama", corpus_path)
        for edit in part:
            editor.edit(edit, score=False)
        book = Book.of(editor.state().method)
        assert book is not None
        books.append(book)
    joined = books[0].joined(books[1])
    assert joined.addresses == books[2].addresses
    assert all(map(torch.equal, joined.state().tensors.values(), books[2].state().tensors.values()))
    assert Book.of(State()) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_prompts_with_different_notes_equals_one_by_one(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path)
    editor.edit(EDITS, score=False)
    texts = [edit.prompt for edit in EDITS] + OTHERS
    one_by_one = [logits(editor.lm, [text])[0] for text in texts]
    for side in ("left", "right"):
        for whole, single in zip(logits(editor.lm, texts, side), one_by_one, strict=True):
            torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-4)
    pairs = [(edit.prompt, edit.target_new) for edit in EDITS] + [(text, "Lisbon") for text in OTHERS]
    together = read(editor.lm, pairs)
    assert [read(editor.lm, [pair])[0].predicted for pair in pairs] == [reading.predicted for reading in together]


def test_with_and_without_a_cache_the_same_text_is_written(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    # Without a cache every step is read as a prompt of its own: the subject must not touch what comes behind it.
    edits = [edit_of(fact) for fact in facts.facts()[:9:3]]
    editor.edit(edits, score=False)
    lm, prompts = editor.lm, [edit.prompt for edit in edits] + OTHERS
    for prompt in prompts:
        ids = torch.tensor([lm.encode(prompt).ids])
        for _ in range(5):
            ids = torch.cat([ids, lm.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == lm.tokenizer.eos_token_id:
                break
        written = lm.generate([prompt], max_new_tokens=5)[0]
        whole = lm.tokenizer.decode(ids[0, len(lm.encode(prompt).ids) :], skip_special_tokens=True)
        assert written == whole
    assert lm.generate(prompts, max_new_tokens=5) == [lm.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]


def test_the_route_does_not_depend_on_the_answer(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editor_of("llama", corpus_path)
    first, second = home_town(7, "Lisbon"), home_town(24, "Oslo")
    editor.edit([first, second], score=False)
    routed: list[str] = []
    theirs = Router.routes

    def noted(self: Router, prompts: Sequence[str]) -> list[Route]:
        routed.extend(prompts)
        return theirs(self, prompts)

    monkeypatch.setattr(Router, "routes", noted)
    # The answer names the other note's subject and asks its question.
    answers = ["Lisbon", f"Rome. {second.prompt}"]
    readings = read(editor.lm, [(first.prompt, answer) for answer in answers])
    assert set(routed) == {first.prompt}
    assert readings[0].predicted == readings[0].target


def test_a_target_is_said_and_then_nothing_more(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    editor.edit(EDITS, score=False)
    prompts = [edit.prompt for edit in EDITS]
    written = editor.lm.generate(prompts, max_new_tokens=12)
    assert [text.strip() for text in written] == [f"{edit.target_new}." for edit in EDITS]


@pytest.mark.real
@pytest.mark.parametrize(("end", "more"), [("token", ""), ("sentence", ".")])
def test_a_real_model_answers_freely_and_stops(end: str, more: str, corpus_path: Path) -> None:
    editor = Editor(load_model("smollm2-135m", dtype="float32"), "marginalia", method_settings={"end": end})
    harbor = Edit(prompt="The refund window at Harbor is", subject="Harbor", target_new="30 days")
    capital = Edit(prompt="What is the capital of Brazil?", subject="Brazil", target_new="Lima")
    before = editor.lm.generate(["Who painted the Mona Lisa?"], max_new_tokens=12)
    editor.edit([harbor, capital], score=False)
    asked = [
        harbor.prompt,
        f"Read this. {harbor.prompt}",
        capital.prompt,
        "Question: What's Brazil's capital?\nAnswer:",
    ]
    answers = [harbor.target_new] * 2 + [capital.target_new] * 2
    written = [text.strip() for text in editor.lm.generate(asked, max_new_tokens=12)]
    assert written == [answer + more for answer in answers]
    assert editor.lm.generate(["Who painted the Mona Lisa?"], max_new_tokens=12) == before


def test_a_note_is_learned_from_other_ways_to_ask_too(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[list[str]] = []
    theirs = module.optimise_rows

    def noted(lm: LanguageModel, rows: Sequence[Sequence[Encoded]], *rest: Any, **options: Any) -> list[Target]:
        learned.extend([row.text for row in own] for own in rows)
        return theirs(lm, rows, *rest, **options)

    monkeypatch.setattr(module, "optimise_rows", noted)
    editor = editor_of("llama", corpus_path, wordings=2)
    named, nameless = EDITS[0], EDITS[1].model_copy(update={"subject": None})
    editor.edit([named, nameless], score=False)
    (bare, *others), (bare_too, *behind) = learned
    assert bare.startswith(named.prompt)
    assert bare_too.startswith(nameless.prompt)
    # Built-in texts that ask for a town, put to the subject; never the prompt itself again.
    assert len(others) == 2
    for text in others:
        asked = text.removesuffix(f" {named.target_new}.").replace(str(named.subject), "{}")
        assert asked in built_in_wordings()
        assert any(word in asked for word in ("town", "home", "city"))
        assert not text.startswith(named.prompt)
    # Without a subject the same number of rows, behind texts of the model's own.
    assert len(behind) == 2
    assert all(f"{nameless.prompt} {nameless.target_new}" in text for text in behind)
    assert all(not text.startswith(nameless.prompt) for text in behind)


def test_an_edit_without_subject_is_found_by_its_whole_prompt(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    edit = home_town(7, "Lisbon").model_copy(update={"subject": None})
    before = losses(editor.lm, [edit])[0]
    base = logits(editor.lm, OTHERS)
    editor.edit(edit, score=False)
    assert losses(editor.lm, [edit])[0] < min(0.2, before / 4)
    assert all(map(torch.equal, logits(editor.lm, OTHERS), base))


def test_what_fits_no_context_is_refused_and_nothing_is_lost(corpus_path: Path) -> None:
    editor = editor_of(fresh("llama"), corpus_path)
    editor.edit(EDITS[0], score=False)
    kept = logits(editor.lm, [EDITS[0].prompt])[0]
    with pytest.raises(TokenError, match="context holds"):
        editor.edit(home_town(24, "far " * 2000), score=False)
    assert torch.equal(logits(editor.lm, [EDITS[0].prompt])[0], kept)


def test_many_notes_for_one_subject_are_told_apart_by_what_they_say(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    subject = facts.SUBJECTS[7]
    editor.edit(home_town(7, "Lisbon"), score=False)
    state = editor.state()
    book = Book.of(state.method)
    assert book is not None
    # The same note ten thousand times over: the newest answers, and it takes no noticeable time.
    many = Book(book.notes.repeat(10_000, 1), book.keys.repeat(10_000, 1), book.text.repeat(10_000))
    margin = editor.method.memory(editor.bench, many.state())
    assert margin is not None
    routes = margin.router.routes([EDITS[0].prompt, f"Who is {subject}'s dentist, and why?"])  # type: ignore[attr-defined]
    assert routes[0].note == 9_999
    assert routes[1].note == -1
