"""The four notions of "correct" on every probe of an edit, whatever the data (evaluation.md, part 1).

Locality always compares with the stored answers of the unedited model, so that model itself scores 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from everedit.edit import Edit
from everedit.evaluation.asked import Pair
from everedit.evaluation.metrics import all_tokens_match, exact_match, mean, prefers, token_accuracy
from everedit.evaluation.protocols._base import METRICS, Answers, Asks, Protocol, Scores, pairs_of

__all__ = ["PROTOCOLS"]


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


def _compared(edit: Edit) -> Iterator[Pair]:
    yield from pairs_of(edit, portability=False)
    if edit.ground_truth is not None:
        yield from ((prompt, edit.ground_truth) for prompt in (edit.prompt, *edit.rephrase))
    yield from ((probe.prompt, edit.target_new) for probe in edit.locality)


PROTOCOLS = (
    Protocol(
        "teacher-forced/token-accuracy@1",
        "share of the target's tokens that are the model's first choice when it is given the tokens before; "
        "locality: share of first choices equal to the unedited model's",
        METRICS,
        lambda edit: Asks(read=tuple(pairs_of(edit))),
        _token_accuracy,
    ),
    Protocol(
        "teacher-forced/all-tokens@1",
        "1 if every token of the target is the model's first choice, else 0; locality likewise",
        METRICS,
        lambda edit: Asks(read=tuple(pairs_of(edit))),
        _all_tokens,
    ),
    Protocol(
        "probability-comparison@1",
        "1 if the new answer has a lower mean loss than the old one; locality: the model still prefers the one "
        "of answer and new target that the unedited model preferred",
        METRICS,
        lambda edit: Asks(read=tuple(_compared(edit))),
        _comparison,
    ),
    Protocol(
        "free-generation/exact-match@1",
        "1 if the text that the model writes freely, up to its natural stop, is the target; locality: the whole "
        "text is the unedited model's",
        METRICS,
        lambda edit: Asks(write=tuple(pairs_of(edit))),
        _generation,
    ),
)
