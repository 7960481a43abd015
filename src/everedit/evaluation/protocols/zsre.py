"""ZsRE edited to the true answer, as in MEMIT, AlphaEdit and NAS (evaluation.md, part 3).

Every figure is the share of a gold answer's tokens that are the model's first choice, the tokens before them given:
of the target on prompt and paraphrase, and of the gold answer to an unrelated question. Unlike WISE's locality, which
compares with the unedited model, specificity compares with the truth, and is far from 1 before any edit.
"""

from __future__ import annotations

from everedit.edit import Edit
from everedit.evaluation.aggregate import harmonic_of
from everedit.evaluation.metrics import mean, token_accuracy
from everedit.evaluation.protocols._base import Answers, Asks, Protocol, Scores, pairs_of

__all__ = ["PROTOCOLS"]


def _score(edit: Edit, now: Answers, base: Answers) -> Scores:
    def gold(prompt: str, answer: str) -> float:
        reading = now.readings[prompt, answer]
        return token_accuracy(reading.predicted, reading.target)

    return {
        "efficacy": gold(edit.prompt, edit.target_new),
        "paraphrase": mean(gold(prompt, edit.target_new) for prompt in edit.rephrase),
        "specificity": mean(gold(probe.prompt, probe.answer) for probe in edit.locality),
    }


PROTOCOLS = (
    Protocol(
        "memit/zsre@1",
        "share of the gold answer's tokens that are the model's first choice, given the tokens before: on the edit "
        "prompt, on a paraphrase and on an unrelated question; S: their harmonic mean",
        ("efficacy", "paraphrase", "specificity"),
        lambda edit: Asks(read=tuple(pairs_of(edit, portability=False))),
        _score,
        derived={"S": harmonic_of("efficacy", "paraphrase", "specificity")},
    ),
)
