"""Score edits under several protocols at once, from one batch of readings and one of generations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from everedit.edit import Edit
from everedit.errors import CacheError, EditError, near_names
from everedit.evaluation.asked import Pair
from everedit.evaluation.contexts import CONTEXTS, asked_in, require_context
from everedit.evaluation.judge import Judge
from everedit.evaluation.protocols import GENERAL, PROTOCOLS, Answers, Asks, Protocol, Scores
from everedit.evaluation.protocols._base import pairs_of
from everedit.evaluation.read import Reading, answers, require_room
from everedit.evaluation.references import References
from everedit.evaluation.sample import require_room_to_sample, samples
from everedit.models import LanguageModel
from everedit.models.memory import give_back_memory

__all__ = ["Baseline", "EditScores", "Evaluator", "average"]

Sample = dict[str, str]


@dataclass
class Baseline:
    """The unedited model's answers to every probe of some edits: what locality is measured against, always."""

    answers: Answers

    @classmethod
    def empty(cls) -> Baseline:
        """Return a baseline without answers."""
        return cls(Answers({}, {}))

    def joined(self, other: Baseline) -> Baseline:
        """Return the answers of both."""
        return Baseline(self.answers.joined(other.answers))

    def says_already(self, edit: Edit) -> bool:
        """Whether the unedited model's first choices are the edit's target, token by token."""
        reading = self.answers.readings[edit.prompt, edit.target_new]
        return reading.predicted == reading.target

    def as_json(self) -> dict[str, Any]:
        """Return plain values for saving: token ids, losses and texts as the model gave them."""
        given = self.answers
        return {
            "readings": [[*pair, list(r.target), list(r.predicted), r.nll] for pair, r in given.readings.items()],
            "texts": [[*pair, text] for pair, text in given.texts.items()],
            "open": [[*pair, text] for pair, text in given.open.items()],
            "samples": [[prompt, text] for prompt, text in given.samples.items()],
            "verdicts": [[*asked, verdict] for asked, verdict in given.verdicts.items()],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Baseline:
        """Return what :meth:`as_json` described. Raises :class:`CacheError` if it is damaged."""
        try:
            readings = {(p, t): Reading(tuple(ids), tuple(said), nll) for p, t, ids, said, nll in value["readings"]}
            found = Answers(readings, {(p, t): text for p, t, text in value["texts"]})
            found.open = {(context, prompt): text for context, prompt, text in value.get("open", ())}
            found.samples = dict(value.get("samples", ()))
            found.verdicts = {(q, a, text): verdict for q, a, text, verdict in value.get("verdicts", ())}
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(what="the stored answers of the unedited model are damaged") from error
        return cls(found)


@dataclass(frozen=True)
class EditScores:
    """One edit's scores by protocol and metric, and what the model wrote on each probe (kind, prompt, …)."""

    scores: dict[str, Scores]
    samples: list[Sample]


@dataclass
class Evaluator:
    """Scores edits on a model under ``protocols`` (names of :data:`PROTOCOLS`).

    A ``judge`` is for ``wild/judged@1``, ``references`` are for the consistency of ``rome/generation@1``, whose texts
    are drawn with ``seed``.
    """

    lm: LanguageModel
    protocols: Sequence[str] = GENERAL
    judge: Judge | None = None
    references: References | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise near_names("protocol", name, list(PROTOCOLS))
        self._chosen = [PROTOCOLS[name] for name in self.protocols]
        for protocol in self._chosen:
            require_context(self.lm, protocol.context, protocol.name)
            if protocol.judged and self.judge is None:
                raise EditError(
                    what=f"the protocol {protocol.name} needs a judge",
                    fix="name one (--set judge.url=… --set judge.model=…), or take wild/question@1",
                )

    def probes(self, edit: Edit) -> list[Pair]:
        """Return every (prompt, answer) of an edit that scoring reads or writes behind; free text has no answer."""
        asked = _Asked.of(self._chosen, [edit])
        framed = ((asked_in(self.lm, *pair), "") for pair in asked.open)
        return list(dict.fromkeys([*asked.read, *asked.write, *framed, *((prompt, "") for prompt in asked.sample)]))

    def check(self, edit: Edit) -> None:
        """Raise :class:`everedit.errors.TokenError` if a probe of the edit does not fit the model's context."""
        asked = _Asked.of(self._chosen, [edit])
        for prompt, answer in asked.read:
            self.lm.encode(prompt, answer)
        for prompt, answer in asked.write:
            require_room(self.lm, prompt, answer)
        for context, prompt in asked.open:
            require_room(self.lm, asked_in(self.lm, context, prompt), "")
        for prompt in asked.sample:
            require_room_to_sample(self.lm, prompt)

    def baseline(self, edits: Sequence[Edit]) -> Baseline:
        """Return the answers of the model as it is now, which must be unedited."""
        return Baseline(self.answers(edits, Baseline.empty()))

    def score(self, edits: Sequence[Edit], baseline: Baseline) -> list[EditScores]:
        """Return the scores of each edit on the model as it is now."""
        return self.score_answers(edits, self.answers(edits, baseline), baseline)

    def score_baseline(self, edits: Sequence[Edit], baseline: Baseline) -> list[EditScores]:
        """Return the scores of the unedited model, from its stored answers."""
        return self.score_answers(edits, baseline.answers, baseline)

    def score_answers(self, edits: Sequence[Edit], now: Answers, baseline: Baseline) -> list[EditScores]:
        """Return the scores of each edit from what a model said (:meth:`answers`)."""
        now, base = replace(now, references=self.references), baseline.answers
        return [
            EditScores(
                {protocol.name: protocol.score(edit, now, base) for protocol in self._chosen},
                list(_samples(edit, now, base)),
            )
            for edit in edits
        ]

    def answers(self, edits: Sequence[Edit], baseline: Baseline) -> Answers:
        """Return what the model as it is now says to everything that the protocols ask about edits.

        It often says what ``baseline`` says; knowing that saves time and changes nothing.
        """
        asked, base = _Asked.of(self._chosen, edits), baseline.answers
        framed = {pair: (asked_in(self.lm, *pair), "") for pair in asked.open}
        said_before = {framed[pair]: text for pair, text in base.open.items() if pair in framed}

        def guesses(pair: Pair) -> list[str]:
            # An edited model says what it said before, or what it was taught.
            known = said_before if not pair[1] else base.texts
            return [known[pair], pair[1]] if pair in known else []

        readings, texts = answers(self.lm, list(asked.read), [*asked.write, *framed.values()], guesses)
        found = Answers(
            readings,
            {pair: texts[pair] for pair in asked.write},
            {pair: texts[framed[pair]] for pair in asked.open},
            samples(self.lm, list(asked.sample), self.seed),
        )
        give_back_memory()
        found.verdicts = dict(self._judged(asked, found, base))
        return found

    def _judged(self, asked: _Asked, found: Answers, base: Answers) -> Iterator[tuple[tuple[str, str, str], bool]]:
        for context, prompt, answer in asked.judge:
            verdict = (prompt, answer, found.open[context, prompt])
            assert self.judge is not None
            # A text that was judged before is not judged again.
            yield verdict, base.verdicts[verdict] if verdict in base.verdicts else self.judge(*verdict)


@dataclass(frozen=True)
class _Asked:
    """All that several protocols ask about several edits, each thing once, in order."""

    read: dict[Pair, None]
    write: dict[Pair, None]
    open: dict[Pair, None]
    sample: dict[str, None]
    judge: dict[tuple[str, str, str], None]

    @classmethod
    def of(cls, protocols: Sequence[Protocol], edits: Iterable[Edit]) -> _Asked:
        found = cls({}, {}, {}, {}, {})
        for edit in edits:
            # Whether an edit's target is said already is asked of every edit.
            found.add(Asks(read=((edit.prompt, edit.target_new),)))
            for protocol in protocols:
                found.add(protocol.asks(edit))
        return found

    def add(self, asks: Asks) -> None:
        self.read.update(dict.fromkeys(asks.read))
        self.write.update(dict.fromkeys(asks.write))
        self.open.update(dict.fromkeys(asks.open))
        self.sample.update(dict.fromkeys(asks.sample))
        self.judge.update(dict.fromkeys(asks.judge))


def average(scores: Sequence[EditScores]) -> dict[str, Scores]:
    """Return each protocol's summary over edits; an edit without a probe does not count there."""
    names = list(dict.fromkeys(name for item in scores for name in item.scores))
    return {name: PROTOCOLS[name].summary([item.scores[name] for item in scores]) for name in names}


def _samples(edit: Edit, now: Answers, base: Answers) -> Iterator[Sample]:
    kinds = ["rewrite", *["rephrase"] * len(edit.rephrase)]
    kinds += ["locality"] * len(edit.locality) + ["portability"] * len(edit.portability)
    for kind, pair in zip(kinds, pairs_of(edit), strict=True):
        prompt, target = pair
        if pair in now.texts:
            yield _sample(kind, prompt, target, base.texts[pair], now.texts[pair])
        # In an instruction or in chat, an edit's prompt may be asked as a question.
        wordings = (prompt, edit.question) if kind == "rewrite" and edit.question else (prompt,)
        for framed in ((context, wording) for context in CONTEXTS for wording in wordings):
            if framed in now.open:
                said = base.open[framed], now.open[framed]
                yield {**_sample(kind, framed[1], target, *said), "context": framed[0]}
    for prompt in edit.generation:
        if prompt in now.samples:
            yield _sample("generation", prompt, "", base.samples[prompt], now.samples[prompt])


def _sample(kind: str, prompt: str, target: str, base: str, edited: str) -> Sample:
    return {"kind": kind, "prompt": prompt, "target": target, "base_text": base, "edited_text": edited}
