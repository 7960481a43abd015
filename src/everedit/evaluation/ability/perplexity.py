"""Perplexity on held-out text: the cheapest alarm for a model that has lost its language."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from everedit.evaluation.ability._base import Outcome, Record, Task
from everedit.evaluation.read import read_ids
from everedit.models import LanguageModel

__all__ = ["TASKS", "detokenised", "losses"]

_WINDOW = 512
_AROUND = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" n't", "n't"))
_BEFORE = re.compile(r" ([.,;:!?%)\]]|'(?:s|re|ve|ll|d|m)\b)")
_AFTER = re.compile(r"([(\[$]) ")


def detokenised(text: str) -> str:
    """Return a text of the WikiText corpora as it was written: signs where they belong, no ``@-@``."""
    for mark, plain in _AROUND:
        text = text.replace(mark, plain)
    return _AFTER.sub(r"\1", _BEFORE.sub(r"\1", text))


def losses(lm: LanguageModel, texts: Sequence[str]) -> list[tuple[float, int] | None]:
    """Return for each text the sum of its tokens' losses and how many they are: all behind the first; None for none.

    A text longer than 512 tokens, or than the model's context, is read in windows that each begin anew.
    """
    rows, owners = [], []
    for number, text in enumerate(texts):
        for window in _windows(lm, text):
            rows.append((window[:1], window[1:]))
            owners.append(number)
    sums: dict[int, tuple[float, int]] = {}
    for owner, reading in zip(owners, read_ids(lm, rows), strict=True):
        total, count = sums.get(owner, (0.0, 0))
        sums[owner] = total + reading.nll * len(reading.target), count + len(reading.target)
    return [sums.get(number) for number in range(len(texts))]


def _windows(lm: LanguageModel, text: str) -> list[tuple[int, ...]]:
    size = min(_WINDOW, lm.context_tokens)
    ids = tuple(lm.tokenizer(text, verbose=False)["input_ids"])
    windows = (ids[start : start + size] for start in range(0, len(ids), size))
    return [window for window in windows if len(window) > 1]


def _each(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    """Read each text by itself."""
    texts = [str(record["text"]) for record in records]
    return [
        None if loss is None else Outcome({"loss": loss[0], "tokens": float(loss[1])}, text, "")
        for text, loss in zip(texts, losses(lm, texts), strict=True)
    ]


def _together(lm: LanguageModel, records: Sequence[Record]) -> list[Outcome | None]:
    """Read the lines of a corpus as one text, window by window."""
    windows = _windows(lm, "\n".join(detokenised(str(record["text"])) for record in records))
    readings = read_ids(lm, [(window[:1], window[1:]) for window in windows])
    return [
        Outcome({"loss": r.nll * len(r.target), "tokens": float(len(r.target))}, lm.tokenizer.decode(window), "")
        for window, r in zip(windows, readings, strict=True)
    ]


def _perplexity(values: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.exp(np.nansum(values["loss"], axis=1) / np.nansum(values["tokens"], axis=1))


def _median(values: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.exp(np.nanmedian(values["loss"] / values["tokens"], axis=1))


def task(name: str, title: str, file: str, *, together: bool = False) -> Task:
    """Return a task that reads texts: their perplexity over all tokens, and the median over texts or windows."""
    derived = {"perplexity": _perplexity, "perplexity_median": _median}
    measure = _together if together else _each
    return Task(name, title, file, measure, ("loss", "tokens"), derived, hidden=("loss", "tokens"))


TASKS = (
    task(
        "perplexity@1",
        "WikiText-2 test, put back into ordinary spelling, in windows of 512 tokens",
        "text/wikitext2_test.jsonl",
        together=True,
    ),
    task("me-ppl@1", "ME-PPL: sentences of seven corpora, each by itself", "text/me_ppl.jsonl"),
)
