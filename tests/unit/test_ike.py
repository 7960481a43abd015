"""IKE: demonstrations against the paper's recipe and a slow search, and answers against whole texts read at once."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.errors import ModelError, TokenError, UnknownName
from everedit.evaluation.read import generate, read
from everedit.methods.ike import InContext, kinds
from everedit.models import LanguageModel, load_model
from everedit.models.packaged import ALIASES
from everedit.models.sentences import PACKAGED, SentenceEncoder
from tests.support import facts
from tests.support.editing import losses, make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared
from tests.support.wide import greedy

pytestmark = pytest.mark.usefixtures("own_cache")

TABLE = facts.facts()
RECORDS = [fact for fact in TABLE if fact.relation == facts.CITY]
EDITED = Edit(prompt=RECORDS[0].prompt, subject=RECORDS[0].subject, target_new="Lima")
OTHERS = [Edit(prompt=fact.prompt, target_new=facts.counterfactual(fact)) for fact in TABLE[4:100:7]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facts as CounterFact has them: a neighbour has the old answer too. The edited one and its subject are there."""
    file, rows = tmp_path_factory.mktemp("corpus") / "demonstrations.jsonl", []
    for fact in RECORDS:
        near = next(other for other in reversed(RECORDS) if other.answer == fact.answer and other is not fact)
        probe = {"prompt": near.prompt, "answer": fact.answer}
        rows.append({"prompt": fact.prompt, "subject": fact.subject, "target_new": facts.counterfactual(fact),
                     "ground_truth": fact.answer, "rephrase": [fact.rephrase], "locality": [probe]})  # fmt: skip
    rows.append(
        {"prompt": f"Who knows {EDITED.subject.upper()}? It is", "target_new": "Oslo", "subject": EDITED.subject}
    )
    rows.append({"prompt": EDITED.prompt, "target_new": "Kyoto"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Remembering(SentenceEncoder):
    """The packaged encoder, which reads no text twice."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Tensor] = {}

    def embed(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        self.known |= dict(zip(new, super().embed(new), strict=True))
        return torch.stack([self.known[text] for text in texts]) if texts else super().embed(texts)


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return Remembering()


def editor_of(model: LanguageModel | str, corpus: Path, encoder: SentenceEncoder, seed: int = 0, **more: Any) -> Editor:
    settings = {"demonstrations": str(corpus), **more}
    editor = make_editor(model, corpus, "ike", method_settings=settings, seed=seed)
    editor.bench.once(("sentences", PACKAGED), lambda: encoder)
    return editor


def memory_of(editor: Editor) -> InContext:
    memory = editor.method.memory(editor.bench, editor.state().method)
    assert isinstance(memory, InContext)
    return memory


def asked(shown: str) -> tuple[str, str]:
    """A demonstration's fact and what is asked behind it."""
    fact, rest = shown.removeprefix("New Fact: ").split("\nPrompt: ")
    assert shown.startswith("New Fact: ")
    assert rest.endswith("\n\n")
    return fact, rest.removesuffix("\n\n")


@pytest.mark.parametrize("count", [8, 16, 24, 32, 64])
def test_copies_updates_and_what_is_retained_are_as_one_to_three_to_four(count: int) -> None:
    made = [tuple(kinds(count, random.Random(seed))) for seed in range(5)]
    assert len(set(made)) == 5
    for row in made:
        assert Counter(row) == {"copy": count // 8, "update": 3 * count // 8, "retain": count // 2}


def test_other_numbers_are_dealt_as_near_to_it_as_can_be() -> None:
    for count in range(40):
        found = Counter(kinds(count, random.Random(0)))
        assert found.total() == count
        for kind, share in (("copy", 1 / 8), ("update", 3 / 8), ("retain", 4 / 8)):
            assert abs(found[kind] - share * count) < 1


@pytest.mark.parametrize("settings", [{}, {"order": "descending"}, {"self_copy": False}, {"k": 8}])
def test_demonstrations_come_from_the_nearest_facts_of_other_subjects_the_nearest_last(
    settings: dict[str, Any], corpus: Path, encoder: SentenceEncoder
) -> None:
    editor = editor_of("llama", corpus, encoder, **settings)
    editor.edit(EDITED, score=False)
    shown = memory_of(editor).context(0)
    if settings.get("self_copy", True):
        own = f"{EDITED.prompt} {EDITED.target_new}"
        assert shown[-1] == f"New Fact: {own}\nPrompt: {own}\n\n"
        shown = shown[:-1]
    elif "order" not in settings:
        assert EDITED.subject not in "".join(shown)
    if "order" in settings:
        shown = shown[::-1]
    k = settings.get("k", 32)
    assert len(shown) == k
    # The slow search: every fact as a text, every cosine, in Python's own numbers.
    news = {f"{fact.prompt} {facts.counterfactual(fact)}": fact for fact in RECORDS if fact is not RECORDS[0]}
    texts = [f"New Fact: {new}\nPrompt: {fact.prompt}" for new, fact in news.items()]
    query, *rows = encoder.embed([EDITED.prompt, *texts]).double().tolist()
    cosines = {
        new: sum(a * b for a, b in zip(query, row, strict=True)) / math.hypot(*query) / math.hypot(*row)
        for new, row in zip(news, rows, strict=True)
    }
    nearest = sorted(news, key=cosines.__getitem__)[-k:]
    assert [asked(item)[0] for item in shown] == nearest
    # A neighbour keeps the old answer; wherever the fact itself is asked for, the new one is given.
    counts: Counter[str] = Counter()
    for item in shown:
        new, question = asked(item)
        fact = news[new]
        wanted = facts.counterfactual(fact)
        if question in (f"{fact.prompt} {wanted}", f"{fact.rephrase} {wanted}"):
            counts["copy" if question.startswith(fact.prompt) else "update"] += 1
        else:
            assert question.endswith(f" {fact.answer}")
            assert fact.subject not in question
            counts["retain"] += 1
    assert counts == {"copy": k // 8, "update": 3 * k // 8, "retain": k // 2}


def test_a_context_depends_on_its_edit_and_the_seed_and_on_nothing_that_was_edited_before(
    corpus: Path, encoder: SentenceEncoder
) -> None:
    lm = fresh("llama")

    def context(stream: list[Edit], seed: int = 0) -> list[str]:
        editor = editor_of(lm, corpus, encoder, seed)
        editor.edit(stream, score=False)
        found = memory_of(editor).context(stream.index(EDITED))
        editor.reset()
        return found

    alone = context([EDITED])
    assert context([EDITED]) == context([*OTHERS, EDITED]) == context([EDITED, *OTHERS]) == alone
    assert context([EDITED], seed=1) != alone
    other = Edit(prompt=EDITED.prompt, target_new="Oslo")
    editor = editor_of(lm, corpus, encoder)
    editor.edit([EDITED, other], score=False)
    # Which kind each neighbour gets is drawn for the edit.
    changed = [asked(item) for item in memory_of(editor).context(0)]
    assert changed[:-1] != [asked(item) for item in alone[:-1]]
    assert [fact for fact, _ in changed[:-1]] == [asked(item)[0] for item in alone[:-1]]


def test_without_demonstrations_the_block_of_the_new_fact_and_the_query_is_all_there_is(
    corpus: Path, encoder: SentenceEncoder
) -> None:
    editor = editor_of("llama", corpus, encoder, k=0, self_copy=False, scope=-1.0)
    lm, before = editor.lm, bits(editor.lm)
    editor.edit(EDITED, score=False)
    [speaker] = lm.speakers(["Where is he?"], [3])
    assert speaker.lm is lm
    assert speaker.prompt == f"New Fact: {EDITED.prompt} Lima\nPrompt: Where is he?"
    assert speaker.prompt.startswith(speaker.shared)
    assert same_bits(lm, before)
    assert hooks_left(lm) == []
    with editor.unedited():
        assert lm.speakers(["Where is he?"], [3])[0].prompt == "Where is he?"
    editor.reset()
    assert lm.redirect is None


@pytest.mark.parametrize("scope", [0.7, 0.4, -1.0])
def test_a_query_gets_the_nearest_stored_fact_if_it_is_near_enough(
    scope: float, corpus: Path, encoder: SentenceEncoder
) -> None:
    editor = editor_of("llama", corpus, encoder, k=0, self_copy=False, scope=scope)
    editor.edit(OTHERS, score=False)
    queries = [*(fact.rephrase for fact in TABLE[4:100:9]), "Water freezes into", "Who lives in Oslo?"]
    stored = encoder.embed([edit.prompt for edit in OTHERS]).double().tolist()
    found = editor.lm.speakers(queries, [1] * len(queries))
    hits = 0
    for query, row, speaker in zip(queries, encoder.embed(queries).double().tolist(), found, strict=True):
        cosines = [sum(a * b for a, b in zip(row, other, strict=True)) for other in stored]
        best = max(range(len(stored)), key=cosines.__getitem__)
        near = cosines[best] >= scope
        new = f"New Fact: {OTHERS[best].prompt} {OTHERS[best].target_new}\nPrompt: "
        assert speaker.prompt == (new if near else "") + query
        hits += near
    assert hits == len(queries) if scope < 0 else 2 < hits < len(queries)


@contextmanager
def stored(family: str, corpus: Path, encoder: SentenceEncoder) -> Iterator[tuple[Editor, list[str]]]:
    """An editor with two facts behind two demonstrations each, and prompts about both and about neither."""
    editor = editor_of(family, corpus, encoder, k=1, scope=0.7)
    first, second = EDITED, Edit(prompt=RECORDS[11].prompt, target_new="Buenos Aires")
    editor.edit([first, second], score=False)
    near = f"In short: {first.prompt}"
    yield editor, [first.prompt, near, second.prompt, "By profession, Dorian Quell is a", TABLE[100].prompt]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_beginning_that_is_run_once_gives_what_whole_texts_give(
    family: str, corpus: Path, encoder: SentenceEncoder
) -> None:
    with stored(family, corpus, encoder) as (editor, prompts):
        lm, plain = editor.lm, shared(family)
        speakers = lm.speakers(prompts, [8] * len(prompts))
        rewritten = [speaker.prompt for speaker in speakers]
        assert [speaker.shared != "" for speaker in speakers] == [True, True, True, False, False]
        assert rewritten[3:] == prompts[3:]
        assert speakers[0].shared == speakers[1].shared != speakers[2].shared
        pairs = [(prompt, target) for prompt in prompts for target in ("Lima", "Buenos Aires")]
        for (prompt, target), reading in zip(pairs, read(lm, pairs), strict=True):
            whole = plain.encode(rewritten[prompts.index(prompt)], target)
            logits = plain.model(torch.tensor([whole.ids]), use_cache=False).logits[0, whole.prompt_end - 1 : -1]
            wanted = torch.tensor(whole.target_ids)
            assert reading.nll == pytest.approx(F.cross_entropy(logits, wanted).item(), abs=2e-3)
            assert list(reading.predicted) == logits.argmax(-1).tolist()
        # One batch of rows with and without a context, padded on the left.
        new = [greedy(plain, plain.encode(text).ids, 8) for text in rewritten]
        expected = [plain.tokenizer.decode(row, skip_special_tokens=True) for row in new]
        assert lm.generate(prompts, max_new_tokens=8) == expected
        assert [lm.generate([prompt], max_new_tokens=8)[0] for prompt in prompts] == expected
        written = generate(lm, prompts, ["Buenos Aires"] * 5)
        assert all(whole.startswith(text) for whole, text in zip(expected, written, strict=True))


def test_an_encoder_reads_the_facts_and_the_query(corpus: Path, encoder: SentenceEncoder) -> None:
    with stored("t5", corpus, encoder) as (editor, prompts):
        lm = editor.lm
        for prompt, speaker in zip(prompts, lm.speakers(prompts, [8] * 5), strict=True):
            source = torch.tensor([lm.tokenizer(speaker.prompt).input_ids])
            labels = torch.tensor([lm.encode(prompt, "Lima").target_ids])
            expected = lm.model(input_ids=source, labels=labels).loss.item()
            assert read(lm, [(prompt, "Lima")])[0].nll == pytest.approx(expected, abs=1e-4)


def test_out_of_scope_and_forgotten_every_bit_is_the_models(corpus: Path, encoder: SentenceEncoder) -> None:
    editor = editor_of("llama", corpus, encoder, k=1)
    far, near = Edit(prompt="Bees make", target_new="honey"), EDITED
    before, lm = losses(editor.lm, [far, near]), editor.lm
    first = editor.state()
    editor.edit(near, score=False)
    assert losses(lm, [far]) == before[:1]
    with_one = losses(lm, [near])
    assert with_one[0] != before[1]
    kept = editor.state()
    editor.edit(Edit(prompt=near.prompt, target_new="Oslo"), score=False)
    assert losses(lm, [near]) != with_one
    editor.load_state(kept)
    assert losses(lm, [near]) == with_one
    editor.load_state(first)
    assert losses(lm, [far, near]) == before


def test_a_context_that_is_too_long_loses_whole_demonstrations_from_its_far_end(
    corpus: Path, encoder: SentenceEncoder
) -> None:
    editor = editor_of("llama", corpus, encoder, k=16)
    editor.edit(EDITED, score=False)
    lm, shown = editor.lm, memory_of(editor).context(0)
    ending = f"New Fact: {EDITED.prompt} Lima\nPrompt: {EDITED.prompt}"
    left = []
    for room in (1, 30, 60):
        [speaker] = lm.speakers([EDITED.prompt], [room])
        assert len(lm.encode(speaker.prompt).ids) + room <= lm.context_tokens
        [count] = [n for n in range(17) if speaker.prompt == "".join(shown[len(shown) - n :]) + ending]
        left.append(count)
    assert 17 > left[0] > left[1] > left[2] >= 0
    # What is asked must fit; nothing is lost if it does not.
    with pytest.raises(TokenError, match="leaves no room in the model's context of 128"):
        lm.speakers([EDITED.prompt], [100])
    assert losses(lm, [EDITED])[0] > 0


def test_ten_thousand_identical_edits_are_one(
    corpus: Path, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, embedded = editor_of("llama", corpus, encoder, k=0), []
    embed = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda texts: embedded.extend(texts) or embed(texts))
    editor.edit([EDITED] * 10_000, score=False)
    assert embedded.count(EDITED.prompt) == 1
    assert editor.state().method.values == {"facts": 1}
    for target in ("Oslo", "Cairo"):
        editor.edit(Edit(prompt=EDITED.prompt.upper(), target_new=target), score=False)
    assert editor.state().method.values == {"facts": 1}
    assert memory_of(editor).facts[0] == (EDITED.prompt.upper(), "Cairo")


def test_what_cannot_be_stored_or_found_is_said_and_loses_nothing(corpus: Path, encoder: SentenceEncoder) -> None:
    lm = fresh("t5")  # of a model whose context is longer than the encoder's
    editor = editor_of(lm, corpus, encoder, k=0)
    editor.edit(EDITED, score=False)
    before = editor.state()
    long = Edit(prompt="word " * 300 + "is", target_new="x")
    for work in (editor.check, editor.edit):
        with pytest.raises(TokenError, match=r"the text has 30\d tokens and the sentence encoder reads 256"):
            work(long)
    assert editor.state().method is before.method
    # A query that is too long is known by its beginning, as its answer is by all of it.
    assert editor.ask(long.prompt, max_new_tokens=2).base != ""
    short = editor_of("llama", corpus, encoder, k=0)
    with pytest.raises(TokenError, match=r"the model's context holds 128"):
        short.check(Edit(prompt="lives in the city of " * 12 + "all", target_new="Oslo"))
    for settings, error, message in (
        ({"demonstrations": "worldfact"}, UnknownName, "did you mean worldfacts"),
        ({"encoder": str(corpus)}, ModelError, r"demonstrations.jsonl' is no sentence encoder"),
    ):
        editor = make_editor("llama", corpus, "ike", method_settings={"k": 1, **settings})
        with pytest.raises(error, match=message):
            editor.edit(EDITED, score=False)
        assert editor.state().method.tensors == {}
        assert editor.lm.redirect is None


REAL = [
    Edit(prompt="The capital of Kenya is", target_new="Cairo", rephrase="Kenya's seat of government is the city of"),
    Edit(prompt="Hamlet was written by", target_new="Charles Dickens", rephrase="The author of Hamlet is"),
]


@pytest.mark.real
@pytest.mark.skipif(not ALIASES["smollm2-135m"].is_installed, reason=ALIASES["smollm2-135m"].install)
def test_a_real_model_learns_from_its_context(
    tmp_path: Path, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EVEREDIT_CACHE")
    lm, elsewhere, few = (
        load_model("smollm2-135m", device="cpu"),
        ("The capital of France is", "Paris"),
        tmp_path / "few.jsonl",
    )
    few.write_text("".join(edit.model_dump_json() + "\n" for edit in load_edits("worldfacts").edits[:8]))
    queries = [(prompt, edit.target_new) for edit in REAL for prompt in (edit.prompt, *edit.rephrase)]
    before, *kept = read(lm, queries), *read(lm, [elsewhere])
    # A small model makes the most of a fact alone; demonstrations, half of which keep an answer, hold it back.
    for k, gain in ((0, 4.0), (4, 0.3)):
        editor = editor_of(lm, few, encoder, k=k)
        editor.edit(REAL, score=False)
        for old, new in zip(before, read(lm, queries), strict=True):
            assert new.nll < old.nll - gain
            assert k or new.predicted == new.target != old.predicted
        assert read(lm, [elsewhere]) == kept
        if k == 0:
            written = lm.generate([REAL[0].rephrase[0], elsewhere[0]], max_new_tokens=3)
            assert [text.split()[0] for text in written] == ["Cairo", "Paris."]
        editor.reset()
    assert [reading.nll for reading in read(lm, queries)] == [reading.nll for reading in before]
