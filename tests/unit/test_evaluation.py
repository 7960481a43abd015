"""Batched scoring gives what one prompt at a time with all logits gives; locality is against the unedited model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from everedit.edit import Edit, Probe
from everedit.errors import CacheError, TokenError, UnknownName
from everedit.evaluation import GENERAL, Baseline, Evaluator
from everedit.evaluation import read as reading
from everedit.evaluation.evaluate import average
from everedit.evaluation.protocols import METRICS, Answers
from everedit.experiments.summary import summarise
from everedit.models import LanguageModel, load_model
from tests.support import facts
from tests.support.editing import home_town, make_editor, probes
from tests.support.loading import bits, edit_of, probe_of, same_bits, shared
from tests.support.running import full_edit

FAMILIES = ["gpt2", "gpt_neo", "opt", "mistral", "gemma2"]  # BOS or none, local attention, learned and rotary positions
TOKENS, ALL, COMPARED, FREE = GENERAL
FACTS = facts.facts()


def some_edits(n: int = 6) -> list[Edit]:
    """Edits with all probes; their texts are of many lengths, and every third is known already."""
    found = []
    for index in range(n):
        fact = FACTS[7 * index]
        more: dict[str, Any] = {
            "ground_truth": fact.answer,
            "locality": tuple(probe_of(FACTS[7 * index + step]) for step in (3, 4)),
            "portability": (Probe(prompt="Well, it rained all day. " * index + fact.rephrase, answer=fact.answer),),
        }
        found.append(edit_of(fact, fact.answer if index % 3 == 0 else None, **more))
    return found


class Plain:
    """One prompt at a time, whole texts, all logits, no padding and no cache."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def logits(self, ids: list[int]) -> torch.Tensor:
        return self.lm.model(torch.tensor([ids]), use_cache=False).logits[0].float()

    def read(self, prompt: str, target: str) -> tuple[list[int], list[int], float]:
        """The target's tokens, the first choices for them, and the mean loss."""
        start = self.lm.tokenizer(prompt).input_ids
        ids = self.lm.tokenizer(f"{prompt} {target}").input_ids
        assert ids[: len(start)] == start
        logits = self.logits(ids)[len(start) - 1 : -1]
        wanted = torch.tensor(ids[len(start) :])
        return wanted.tolist(), logits.argmax(-1).tolist(), float(F.cross_entropy(logits, wanted))

    def write(self, prompt: str, target: str) -> str:
        """Greedy tokens until one ends in a full stop or holds a line break, at most six more than the target."""
        ids, room = self.lm.tokenizer(prompt).input_ids, len(self.read(prompt, target)[0]) + 6
        new: list[int] = []
        while len(new) < room:
            new.append(int(self.logits([*ids, *new])[-1].argmax()))
            text = self.lm.tokenizer.decode(new[-1:])
            if new[-1] == self.lm.tokenizer.eos_token_id or text.endswith(".") or "\n" in text:
                break
        return str(self.lm.tokenizer.decode(new, skip_special_tokens=True))


def share(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def plain_scores(now: Plain, base: Plain, edit: Edit) -> dict[str, dict[str, float]]:
    """The metrics of an edit, written anew from evaluation.md."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    asked = {
        "reliability": [(edit.prompt, edit.target_new)],
        "generalization": [(prompt, edit.target_new) for prompt in edit.rephrase],
        "portability": [(probe.prompt, probe.answer) for probe in edit.portability],
    }
    kept = [(probe.prompt, probe.answer) for probe in edit.locality]
    shares = {name: [share(*now.read(*pair)[1::-1]) for pair in pairs] for name, pairs in asked.items()}
    same = [share(now.read(*pair)[1], base.read(*pair)[1]) for pair in kept]
    free = {
        name: [float(now.write(*pair).strip(" .\n").lower() == pair[1].lower()) for pair in pairs]
        for name, pairs in asked.items()
    }

    def preference(model: Plain, prompt: str, one: str, other: str) -> bool:
        return model.read(prompt, one)[2] < model.read(prompt, other)[2]

    old, new = str(edit.ground_truth), edit.target_new
    compared = {n: mean([float(preference(now, p, new, old)) for p, _ in asked[n]]) for n in list(asked)[:2]}
    stays = [float(preference(now, p, a, new) == preference(base, p, a, new)) for p, a in kept if a != new]
    texts = [float(now.write(*pair) == base.write(*pair)) for pair in kept]
    return {
        TOKENS: {**{name: mean(values) for name, values in shares.items()}, "locality": mean(same)},
        ALL: {
            **{name: mean([float(value == 1) for value in values]) for name, values in shares.items()},
            "locality": mean([float(value == 1) for value in same]),
        },
        COMPARED: {**compared, "locality": mean(stays)},
        FREE: {**{name: mean(values) for name, values in free.items()}, "locality": mean(texts)},
    }


def equal(found: dict[str, Any], expected: dict[str, dict[str, float]]) -> None:
    assert found.keys() == expected.keys() == set(GENERAL)
    for protocol, scores in expected.items():
        for metric, value in scores.items():
            assert found[protocol][metric] == pytest.approx(value), (protocol, metric)


# --------------------------------------------------------------------------- against one at a time


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_read_what_single_prompts_read(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = shared(family)
    pairs = [pair for edit in some_edits() for pair in Evaluator(lm).probes(edit)]
    expected = [Plain(lm).read(*pair) for pair in pairs]
    for tokens, logits in ((2048, 1 << 25), (40, 1), (1, 1)):
        monkeypatch.setattr(reading, "_TOKENS_A_BATCH", tokens)
        monkeypatch.setattr(reading, "_LOGITS_A_CHUNK", logits)
        found = reading.read(lm, pairs)
        assert [(list(r.target), list(r.predicted)) for r in found] == [(t, p) for t, p, _ in expected]
        assert [r.nll for r in found] == pytest.approx([nll for _, _, nll in expected], abs=1e-4)
    assert len({len(target) for target, _, _ in expected}) > 1
    assert any(target != predicted for target, predicted, _ in expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_write_what_single_prompts_write(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = shared(family)
    pairs = list(dict.fromkeys(pair for edit in some_edits() for pair in Evaluator(lm).probes(edit)))
    expected = [Plain(lm).write(*pair) for pair in pairs]
    for rows in (64, 3, 1):
        monkeypatch.setattr(reading, "_ROWS_A_GENERATION", rows)
        assert reading.generate(lm, [p for p, _ in pairs], [t for _, t in pairs]) == expected
    assert sum(
        text.strip(" .") in {answer for group in facts.ANSWERS.values() for answer in group} for text in expected
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_change_the_work_and_not_the_texts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = shared(family)
    pairs = list(dict.fromkeys(pair for edit in some_edits() for pair in Evaluator(lm).probes(edit)))
    expected = dict(zip(pairs, reading.generate(lm, [p for p, _ in pairs], [t for _, t in pairs]), strict=True))

    def written(guesses: Any) -> tuple[dict[tuple[str, str], str], int]:
        passes = 0
        plain = LanguageModel.states

        def counted(self: LanguageModel, **inputs: Any) -> torch.Tensor:
            nonlocal passes
            passes += 1
            return plain(self, **inputs)

        with monkeypatch.context() as patched:
            patched.setattr(LanguageModel, "states", counted)
            return reading.answers(lm, [], pairs, guesses)[1], passes

    texts, without = written(lambda pair: ())
    assert texts == expected
    texts, passes = written(lambda pair: (expected[pair],))
    assert texts == expected
    assert passes < without
    for wrong in ("Oslo", "a", "Berlin. And more.", "Par"):
        assert written(lambda pair, wrong=wrong: (wrong, expected[pair][:4]))[0] == expected
        # Right at first, and then not.
        assert written(lambda pair, wrong=wrong: (f"{expected[pair][:6]} {wrong}", pair[1]))[0] == expected


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_scores_before_and_after_an_edit_are_those_of_the_plain_definitions(family: str, corpus_path: Path) -> None:
    editor, edits = make_editor(family, corpus_path, "rome"), [full_edit(0), *some_edits(3)]
    base = Plain(shared(family))
    baseline = editor.evaluator.baseline(edits)
    for found, edit in zip(editor.evaluator.score_baseline(edits, baseline), edits, strict=True):
        equal(found.scores, plain_scores(base, base, edit))
    with editor.trial(edits[0], score=False):
        scores = editor.evaluator.score(edits, baseline)
        for found, edit in zip(scores, edits, strict=True):
            equal(found.scores, plain_scores(Plain(editor.lm), base, edit))
    assert [scores[0].scores[name]["reliability"] for name in GENERAL] == [1.0] * 4


@pytest.mark.real
def test_a_real_model_reads_and_writes_alike_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_model("smollm2-135m", device="cpu")
    pairs = [
        ("The capital of France is", "Paris"),
        ("The capital of Kenya, as everybody who has been to school knows, is", "Nairobi"),
        ("Q: Who wrote Hamlet?\nA:", "William Shakespeare"),
        ("Water freezes into", "ice"),
    ]
    plain = Plain(lm)
    found = reading.read(lm, pairs)
    for read, pair in zip(found, pairs, strict=True):
        target, predicted, nll = plain.read(*pair)
        assert (list(read.target), list(read.predicted)) == (target, predicted)
        assert read.nll == pytest.approx(nll, abs=1e-3)
    texts = reading.generate(lm, [p for p, _ in pairs], [t for _, t in pairs])
    assert texts == [plain.write(*pair) for pair in pairs]
    assert "Paris" in texts[0]


# --------------------------------------------------------------------------- the unedited model


def test_the_unedited_model_scores_one_in_locality_everywhere() -> None:
    lm, edits = shared("llama"), some_edits()
    evaluator = Evaluator(lm)
    baseline = evaluator.baseline(edits)
    for scores in (evaluator.score(edits, baseline), evaluator.score_baseline(edits, baseline)):
        for name in GENERAL:
            assert {item.scores[name]["locality"] for item in scores} == {1.0}
    assert [baseline.says_already(edit) for edit in edits] == [index % 3 == 0 for index in range(len(edits))]
    known = [item.scores[TOKENS]["reliability"] for item in evaluator.score(edits, baseline)]
    assert [value == 1.0 for value in known] == [index % 3 == 0 for index in range(len(edits))]


@pytest.mark.usefixtures("own_cache")
def test_locality_is_what_the_unedited_model_said_right_or_wrong(corpus_path: Path) -> None:
    editor = make_editor("llama", corpus_path, "rome")
    # The model has this answer wrong: keeping to its own words is locality all the same.
    wrong = tuple(Probe(prompt=probe.prompt, answer="violin") for probe in probes())
    edit = home_town(0, locality=wrong)
    baseline = editor.evaluator.baseline([edit])
    before = bits(editor.lm)
    assert editor.evaluator.score([edit], baseline)[0].scores[TOKENS]["locality"] == 1.0
    with editor.trial(edit, score=False):
        assert not same_bits(editor.lm, before)
        later = editor.evaluator.score([edit], baseline)[0].scores[TOKENS]["locality"]
        fooled = editor.evaluator.score([edit], editor.evaluator.baseline([edit]))[0].scores[TOKENS]["locality"]
        expected = [
            share(Plain(editor.lm).read(p.prompt, p.answer)[1], Plain(shared("llama")).read(p.prompt, p.answer)[1])
            for p in wrong
        ]
    assert later == sum(expected) / len(expected)
    assert fooled == 1.0


def test_a_baseline_goes_through_a_file_and_joins() -> None:
    lm, edits = shared("gpt2"), some_edits(4)
    evaluator = Evaluator(lm)
    whole = evaluator.baseline(edits)
    joined = Baseline.empty().joined(evaluator.baseline(edits[:2])).joined(evaluator.baseline(edits[2:]))
    assert joined.answers.texts == whole.answers.texts
    assert joined.answers.readings.keys() == whole.answers.readings.keys()
    assert Baseline.from_json(whole.as_json()) == whole
    with pytest.raises(CacheError, match="damaged"):
        Baseline.from_json({"readings": [[1, 2]], "texts": []})


def test_what_is_not_there_is_not_scored() -> None:
    evaluator, bare = Evaluator(shared("gpt2")), home_town(0)
    scores = evaluator.score([bare], evaluator.baseline([bare]))[0]
    for name in GENERAL:
        assert scores.scores[name].keys() == set(METRICS)
        assert [scores.scores[name][m] for m in ("generalization", "locality", "portability")] == [None] * 3
    assert scores.scores[COMPARED]["reliability"] is None  # there is no old answer to compare with
    assert scores.scores[TOKENS]["reliability"] is not None
    both = average([scores, evaluator.score(edits := some_edits(1), evaluator.baseline(edits))[0]])
    assert both[TOKENS]["locality"] == 1.0


def test_only_the_chosen_protocols_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, edits = shared("gpt2"), some_edits(2)
    monkeypatch.setattr("everedit.models.prefill.Prefill.continuations", None)
    evaluator = Evaluator(lm, (TOKENS,))
    [scores, _] = evaluator.score(edits, evaluator.baseline(edits))
    assert list(scores.scores) == [TOKENS]
    assert scores.samples == []
    with pytest.raises(UnknownName, match="protocol"):
        Evaluator(lm, ("teacher-forced/token-acuracy@1",))


def test_a_probe_that_does_not_fit_the_context_is_named() -> None:
    evaluator = Evaluator(shared("gpt2"))
    evaluator.check(some_edits(1)[0])
    fits = home_town(0).prompt
    with pytest.raises(TokenError, match="context"):
        evaluator.check(home_town(0, rephrase=("a " * 118 + fits,)))
    with pytest.raises(TokenError, match="context"):
        evaluator.check(home_town(0, locality=(Probe(prompt="a " * 300, answer="b"),)))


def test_rows_of_any_length_are_written_together_as_far_as_the_context_goes() -> None:
    lm = shared("gpt2")
    long, short = "a " * 110 + "Mira Lanner", "The home town of Mira Lanner"
    pairs = [(long, "Oslo"), (short, "a long answer in the city of New Delhi and of Buenos Aires")]
    room = [len(lm.encode(*pair).target_ids) + 6 for pair in pairs]
    assert len(lm.encode(long).ids) + room[0] <= lm.context_tokens < len(lm.encode(long).ids) + room[1]
    together = reading.generate(lm, [p for p, _ in pairs], [t for _, t in pairs])
    assert together == [reading.generate(lm, [p], [t])[0] for p, t in pairs]


# --------------------------------------------------------------------------- immediate, retained, final


def test_immediate_retained_and_final_are_three_things() -> None:
    """Three edits; the second undoes the first, the third brings it back and loses the second."""

    def scores(reliability: float | None) -> dict[str, dict[str, float | None]]:
        return {ALL: {**dict.fromkeys(METRICS), "reliability": reliability}}

    after = [[1.0], [0.0, 1.0], [1.0, 0.0, 0.5]]  # after[n][i]: edit i once n + 1 are made
    rows: list[dict[str, Any]] = []
    for n, seen in enumerate(after, start=1):
        rows.append(
            {"kind": "edit", "n": n, "immediate": scores(seen[-1]), "seconds": {"solve": float(n)}, "memory_mb": 1.0}
        )
        parts = dict.fromkeys(("retained", "uncontradicted", "first_100"), scores(sum(seen) / n))
        rows.append({"kind": "checkpoint", "n": n, **parts, "intervals": {ALL: {}}, "contradicted": 0})
    found = summarise(rows, [scores(value) for value in after[-1]], [scores(0.25)] * 3, 2, 9.0)
    marks = found["protocols"][ALL]["checkpoints"]
    table = {n: [marks[n][when]["reliability"] for when in ("immediate", "retained", "final")] for n in marks}
    assert table == {"1": [1.0, 1.0, 1.0], "2": [1.0, 0.5, 0.5], "3": [pytest.approx(2.5 / 3), 0.5, 0.5]}
    assert found["protocols"][ALL]["unedited"]["reliability"] == 0.25
    assert found["protocols"][ALL]["unedited"]["locality"] is None
    assert found["seconds_per_edit"] == {"solve": 2.0, "total": 2.0}
    assert (found["edits"], found["quarantined"], found["peak_memory_mb"]) == (3, 2, 9.0)


def test_answers_of_one_model_do_not_touch_the_others() -> None:
    first, second = Answers({}, {("p", "t"): "x"}), Answers({}, {("p", "t"): "y"})
    joined = Baseline(first).joined(Baseline(second))
    assert (joined.answers.texts, first.texts) == ({("p", "t"): "y"}, {("p", "t"): "x"})
