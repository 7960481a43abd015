"""The four notions of "correct", and of "unchanged", each a pure function of one prediction (evaluation.md, 1)."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence

__all__ = [
    "all_tokens_match",
    "any_match",
    "exact_match",
    "mean",
    "natural_stop",
    "normalise_answer",
    "prefers",
    "token_accuracy",
]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_accuracy(predicted: Sequence[int], reference: Sequence[int]) -> float:
    """Return the share of equal tokens, (1/m) sum_j [predicted_j = reference_j] (EasyEdit, WISE, SimIE).

    With the target as reference this is reliability; with the unedited model's tokens, locality.
    """
    if len(predicted) != len(reference) or not reference:
        raise ValueError("predicted and reference must have one and the same length above 0")
    return sum(p == r for p, r in zip(predicted, reference, strict=True)) / len(reference)


def all_tokens_match(predicted: Sequence[int], reference: Sequence[int]) -> float:
    """Return 1.0 if every token is equal, else 0.0 (WilKE)."""
    return float(token_accuracy(predicted, reference) == 1.0)


def prefers(nll_this: float, nll_other: float) -> float:
    """Return 1.0 if the first text has the lower mean negative log-likelihood, strictly (ROME, MEMIT)."""
    return float(nll_this < nll_other)


def exact_match(text: str, target: str) -> float:
    """Return 1.0 if the generated text, cut at its natural stop, is the target after SQuAD's normalisation."""
    return _same(natural_stop(text, target), target)


def any_match(text: str, answers: Iterable[str]) -> float:
    """Return 1.0 if the text up to its first full stop or line break is one of the answers, normalised as in SQuAD.

    The stop does not depend on the answer, so one that holds a full stop ("St. Louis") cannot be met.
    """
    said = natural_stop(text)
    return max((_same(said, answer) for answer in answers), default=0.0)


def _same(said: str, wanted: str) -> float:
    if normalise_answer(wanted):
        said, wanted = normalise_answer(said), normalise_answer(wanted)
    # A target of nothing but articles or punctuation ("A") would otherwise be met by an empty text.
    return float(said.casefold() == wanted.casefold())


def natural_stop(text: str, target: str = "") -> str:
    """Return ``text`` up to its first line break or sentence end; a full stop within the target's length stays."""
    line = text.strip().split("\n", 1)[0].strip()
    reach = len(target.rstrip(".")) if "." in target else 0
    end = line.find(".", reach)
    return line if end < 0 else line[:end]


def normalise_answer(text: str) -> str:
    """Return ``text`` in lower case without punctuation, articles and repeated spaces (SQuAD)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that exist, or None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
