"""Score edits under several protocols at once, from one batch of readings and one of generations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from everedit.edit import Edit
from everedit.errors import CacheError, near_names
from everedit.evaluation.metrics import mean
from everedit.evaluation.protocols import METRICS, PROTOCOLS, Answers, Scores
from everedit.evaluation.read import Reading, answers, require_room
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
        readings = {**self.answers.readings, **other.answers.readings}
        return Baseline(Answers(readings, {**self.answers.texts, **other.answers.texts}))

    def says_already(self, edit: Edit) -> bool:
        """Whether the unedited model's first choices are the edit's target, token by token."""
        reading = self.answers.readings[edit.prompt, edit.target_new]
        return reading.predicted == reading.target

    def as_json(self) -> dict[str, Any]:
        """Return plain values for saving."""
        return {
            "readings": [
                [prompt, target, list(r.target), list(r.predicted), r.nll]
                for (prompt, target), r in self.answers.readings.items()
            ],
            "texts": [[prompt, target, text] for (prompt, target), text in self.answers.texts.items()],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Baseline:
        """Return what :meth:`as_json` described. Raises :class:`CacheError` if it is damaged."""
        try:
            readings = {(p, t): Reading(tuple(ids), tuple(said), nll) for p, t, ids, said, nll in value["readings"]}
            return cls(Answers(readings, {(p, t): text for p, t, text in value["texts"]}))
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(what="the stored answers of the unedited model are damaged") from error


@dataclass(frozen=True)
class EditScores:
    """One edit's scores by protocol and metric, and what the model wrote on each probe (kind, prompt, …)."""

    scores: dict[str, Scores]
    samples: list[Sample]


@dataclass
class Evaluator:
    """Scores edits on a model under ``protocols`` (names of :data:`PROTOCOLS`)."""

    lm: LanguageModel
    protocols: Sequence[str] = tuple(PROTOCOLS)

    def __post_init__(self) -> None:
        for name in self.protocols:
            if name not in PROTOCOLS:
                raise near_names("protocol", name, list(PROTOCOLS))
        self._chosen = [PROTOCOLS[name] for name in self.protocols]

    def probes(self, edit: Edit) -> list[tuple[str, str]]:
        """Return every (prompt, answer) of an edit that scoring will read."""
        return [*_probes(edit), *(_comparisons(edit) if self._compares else ())]

    def check(self, edit: Edit) -> None:
        """Raise :class:`everedit.errors.TokenError` if a probe of the edit does not fit the model's context."""
        for prompt, answer in self.probes(edit):
            self.lm.encode(prompt, answer)
        for prompt, answer in _probes(edit) if self._generates else ():
            require_room(self.lm, prompt, answer)

    def baseline(self, edits: Sequence[Edit]) -> Baseline:
        """Return the answers of the model as it is now, which must be unedited."""
        return Baseline(self.answers(edits, Baseline.empty()))

    def answers(self, edits: Sequence[Edit], baseline: Baseline) -> Answers:
        """Return what the model as it is now says to every probe of some edits.

        It often says what ``baseline`` says; knowing that saves time and changes nothing.
        """
        return self._answer(edits, baseline.answers)

    def score(self, edits: Sequence[Edit], baseline: Baseline) -> list[EditScores]:
        """Return the scores of each edit on the model as it is now."""
        return self._score(edits, self._answer(edits, baseline.answers), baseline.answers)

    def score_baseline(self, edits: Sequence[Edit], baseline: Baseline) -> list[EditScores]:
        """Return the scores of the unedited model, from its stored answers."""
        return self._score(edits, baseline.answers, baseline.answers)

    def _score(self, edits: Sequence[Edit], now: Answers, base: Answers) -> list[EditScores]:
        return [
            EditScores(
                {protocol.name: protocol.score(edit, now, base) for protocol in self._chosen},
                list(_samples(edit, now, base)),
            )
            for edit in edits
        ]

    def _answer(self, edits: Sequence[Edit], base: Answers) -> Answers:
        pairs = [pair for edit in edits for pair in _probes(edit)]
        compared = [pair for edit in edits for pair in _comparisons(edit)] if self._compares else []

        def guesses(pair: tuple[str, str]) -> list[str]:
            # An edited model says what it said before, or what it was taught.
            return [base.texts[pair], pair[1]] if pair in base.texts else []

        readings, texts = answers(self.lm, [*pairs, *compared], pairs if self._generates else [], guesses)
        give_back_memory()
        return Answers(readings, texts)

    @property
    def _compares(self) -> bool:
        return any(protocol.compares for protocol in self._chosen)

    @property
    def _generates(self) -> bool:
        return any(protocol.generates for protocol in self._chosen)


def average(scores: Sequence[EditScores]) -> dict[str, Scores]:
    """Return the mean over edits of each protocol's metrics; an edit without a probe does not count there."""
    names = list(dict.fromkeys(name for item in scores for name in item.scores))
    return {
        name: {metric: mean(item.scores[name][metric] for item in scores if name in item.scores) for metric in METRICS}
        for name in names
    }


def _probes(edit: Edit) -> Iterator[tuple[str, str]]:
    yield edit.prompt, edit.target_new
    yield from ((prompt, edit.target_new) for prompt in edit.rephrase)
    yield from ((probe.prompt, probe.answer) for probe in (*edit.locality, *edit.portability))


def _comparisons(edit: Edit) -> Iterator[tuple[str, str]]:
    if edit.ground_truth is not None:
        yield from ((prompt, edit.ground_truth) for prompt in (edit.prompt, *edit.rephrase))
    yield from ((probe.prompt, edit.target_new) for probe in edit.locality)


def _samples(edit: Edit, now: Answers, base: Answers) -> Iterator[Sample]:
    kinds = ["rewrite", *["rephrase"] * len(edit.rephrase)]
    kinds += ["locality"] * len(edit.locality) + ["portability"] * len(edit.portability)
    for kind, pair in zip(kinds, _probes(edit), strict=True):
        if pair in now.texts:
            yield {
                "kind": kind,
                "prompt": pair[0],
                "target": pair[1],
                "base_text": base.texts[pair],
                "edited_text": now.texts[pair],
            }
