"""Named, versioned protocols: how readings become reliability, generalization, locality and portability.

A protocol's version goes up when its numbers would change meaning. Locality always compares with the stored
answers of the unedited model, so that model itself scores 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from everedit.edit import Edit
from everedit.evaluation.metrics import all_tokens_match, exact_match, mean, prefers, token_accuracy
from everedit.evaluation.read import Reading

__all__ = ["METRICS", "PROTOCOLS", "Answers", "Protocol"]

METRICS = ("reliability", "generalization", "locality", "portability")
Scores = dict[str, float | None]


@dataclass
class Answers:
    """What one model says: readings by (prompt, target) and generated texts by prompt."""

    readings: dict[tuple[str, str], Reading]
    texts: dict[tuple[str, str], str]


@dataclass(frozen=True)
class Protocol:
    """A way of scoring one edit. ``generates`` and ``compares`` say which answers it needs."""

    name: str
    explanation: str
    score: Callable[[Edit, Answers, Answers], Scores]
    generates: bool = False
    compares: bool = False


def _scores(
    edit: Edit, correct: Callable[[str, str], float | None], same: Callable[[str, str], float | None]
) -> Scores:
    return {
        "reliability": correct(edit.prompt, edit.target_new),
        "generalization": mean(correct(prompt, edit.target_new) for prompt in edit.rephrase),
        "locality": mean(same(probe.prompt, probe.answer) for probe in edit.locality),
        "portability": mean(correct(probe.prompt, probe.answer) for probe in edit.portability),
    }


def _token_accuracy(edit: Edit, now: Answers, base: Answers) -> Scores:
    def correct(prompt: str, target: str) -> float:
        reading = now.readings[prompt, target]
        return token_accuracy(reading.predicted, reading.target)

    def same(prompt: str, target: str) -> float:
        return token_accuracy(now.readings[prompt, target].predicted, base.readings[prompt, target].predicted)

    return _scores(edit, correct, same)


def _all_tokens(edit: Edit, now: Answers, base: Answers) -> Scores:
    def correct(prompt: str, target: str) -> float:
        reading = now.readings[prompt, target]
        return all_tokens_match(reading.predicted, reading.target)

    def same(prompt: str, target: str) -> float:
        return all_tokens_match(now.readings[prompt, target].predicted, base.readings[prompt, target].predicted)

    return _scores(edit, correct, same)


def _comparison(edit: Edit, now: Answers, base: Answers) -> Scores:
    old = edit.ground_truth

    def correct(prompt: str, target: str) -> float | None:
        if old is None:
            return None
        return prefers(now.readings[prompt, target].nll, now.readings[prompt, old].nll)

    def same(prompt: str, answer: str) -> float | None:
        if answer == edit.target_new:
            return None
        preferred = [
            prefers(answers.readings[prompt, answer].nll, answers.readings[prompt, edit.target_new].nll)
            for answers in (now, base)
        ]
        return float(preferred[0] == preferred[1])

    # A portability probe has no old answer to compare with.
    return _scores(edit.model_copy(update={"portability": ()}), correct, same)


def _generation(edit: Edit, now: Answers, base: Answers) -> Scores:
    def correct(prompt: str, target: str) -> float:
        return exact_match(now.texts[prompt, target], target)

    def same(prompt: str, target: str) -> float:
        return float(now.texts[prompt, target] == base.texts[prompt, target])

    return _scores(edit, correct, same)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "teacher-forced/token-accuracy@1",
            "share of the target's tokens that are the model's first choice when it is given the tokens before; "
            "locality: share of first choices equal to the unedited model's",
            _token_accuracy,
        ),
        Protocol(
            "teacher-forced/all-tokens@1",
            "1 if every token of the target is the model's first choice, else 0; locality likewise",
            _all_tokens,
        ),
        Protocol(
            "probability-comparison@1",
            "1 if the new answer has a lower mean loss than the old one; locality: the model still prefers the one "
            "of answer and new target that the unedited model preferred",
            _comparison,
            compares=True,
        ),
        Protocol(
            "free-generation/exact-match@1",
            "1 if the text that the model writes freely, up to its natural stop, is the target; locality: the whole "
            "text is the unedited model's",
            _generation,
            generates=True,
        ),
    )
}
