"""The lifelong protocols of WISE and SimIE (evaluation.md, part 4): a stream, then everything on the final model.

Wang et al., "WISE", NeurIPS 2024. Rel, Gen and Loc are means over the edits of token accuracies with the target given,
on the edit prompt, on one paraphrase, and on one unrelated prompt against the unedited model's own choices.
Hallucination's Rel is the perplexity of a sentence behind the passage before it; temporal's generality asks whether
another text on the subject has become likely.
"""

from __future__ import annotations

import math

from everedit.edit import Edit
from everedit.evaluation.aggregate import mean_of_means, median_of
from everedit.evaluation.asked import Pair
from everedit.evaluation.metrics import token_accuracy
from everedit.evaluation.protocols._base import Answers, Asks, Protocol, Scores

__all__ = ["PROTOCOLS"]

LIKELY = -math.log(0.8)
"""A held-out text counts if its mean loss per token is below this (evaluation.md, part 4)."""


def _pairs(edit: Edit) -> tuple[Pair, ...]:
    """The edit itself, one paraphrase, one locality probe."""
    pairs = [(prompt, edit.target_new) for prompt in (edit.prompt, *edit.rephrase[:1])]
    return (*pairs, *((probe.prompt, probe.answer) for probe in edit.locality[:1]))


def _accuracy(now: Answers, prompt: str, target: str) -> float:
    reading = now.readings[prompt, target]
    return token_accuracy(reading.predicted, reading.target)


def _locality(edit: Edit, now: Answers, base: Answers) -> float | None:
    if not edit.locality:
        return None
    pair = (edit.locality[0].prompt, edit.locality[0].answer)
    return token_accuracy(now.readings[pair].predicted, base.readings[pair].predicted)


def _lifelong(edit: Edit, now: Answers, base: Answers) -> Scores:
    return {
        "reliability": _accuracy(now, edit.prompt, edit.target_new),
        "generalization": _accuracy(now, edit.rephrase[0], edit.target_new) if edit.rephrase else None,
        "locality": _locality(edit, now, base),
    }


def _hallucination(edit: Edit, now: Answers, base: Answers) -> Scores:
    return {
        "perplexity": math.exp(min(now.readings[edit.prompt, edit.target_new].nll, 700.0)),
        "locality": _locality(edit, now, base),
    }


def _held_out(edit: Edit) -> tuple[Pair, ...]:
    """A text as (first word, the rest): what is read is everything that something stands before."""
    first, _, rest = (edit.held_out or "").partition(" ")
    return ((first, rest),) if rest.strip() else ()


def _temporal(edit: Edit, now: Answers, base: Answers) -> Scores:
    nll = next((now.readings[pair].nll for pair in _held_out(edit)), None)
    return {
        "reliability": _accuracy(now, edit.prompt, edit.target_new),
        "held_out": None if nll is None else float(nll < LIKELY),
        "held_out_loss": nll,
        "locality": _locality(edit, now, base),
    }


PROTOCOLS = (
    Protocol(
        "wise/lifelong@1",
        "share of tokens that are the model's first choice, the tokens before given: of the target on the edit prompt "
        "and on one paraphrase, and, on one unrelated prompt, of the unedited model's choices; average: of the three",
        ("reliability", "generalization", "locality"),
        lambda edit: Asks(read=_pairs(edit)),
        _lifelong,
        derived={"average": mean_of_means("reliability", "generalization", "locality")},
    ),
    Protocol(
        "wise/hallucination@1",
        "perplexity of the true sentence behind the passage before it, mean and median over edits; locality: share of "
        "first choices on web text equal to the unedited model's",
        ("perplexity", "locality"),
        lambda edit: Asks(read=_pairs(edit.model_copy(update={"rephrase": ()}))),
        _hallucination,
        derived={"perplexity_median": median_of("perplexity")},
    ),
    Protocol(
        "wise/temporal@1",
        "reliability: share of the paragraph's tokens that are the model's first choice; held_out: another text on the "
        "subject has a mean loss below -log 0.8; locality: share of first choices equal to the unedited model's",
        ("reliability", "held_out", "held_out_loss", "locality"),
        lambda edit: Asks(read=(*_pairs(edit.model_copy(update={"rephrase": ()})), *_held_out(edit))),
        _temporal,
    ),
)
