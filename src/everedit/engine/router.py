"""Which of many stored notes, if any, a prompt is about: decided from its text alone (marginalia.md, "Routing").

A note's address is its subject and the rest of its prompt. A prompt is about the note if it names the subject, and if
the sentence that asks also asks for the same thing (:mod:`everedit.engine.relation`). Notes without a subject
are compared with the whole sentence, more strictly. Of notes that ask for the same thing the newest answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.mentions import Mention, Mentions
from everedit.engine.relation import MASK, RelationMetric

__all__ = ["Address", "Route", "Router", "asking_part", "masked"]

_BREAK = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[^\W_a-z])|\n+")
_SHORT = re.compile(r"\b(?:[A-Z]|[A-Z][a-z]{1,2}|vs|no)\.$")
_PRONOUN = re.compile(r"\b(?:it|its|he|his|him|she|her|hers|they|their|them|this|that|these|those|there)\b", re.I)
_CLAUSE = re.compile(r"[,;:—–]\s|\s(?:but|and|while|whereas)\s")
_SAME = 0.65


@dataclass(frozen=True)
class Address:
    """What a note is about: the ``names`` of its subject, none if it has no subject, and its prompt."""

    names: tuple[str, ...]
    prompt: str

    @classmethod
    def of(cls, edit: Edit) -> Address:
        """Return the address of an edit's note."""
        return cls((edit.subject, *edit.aliases) if edit.subject else (), edit.prompt)

    def key(self) -> str:
        """Return the text that prompts are compared with: the prompt's asking part, its subject masked."""
        start, end = asking_part(self.prompt)
        mention = _last(Mentions((name, 0) for name in self.names).find(self.prompt))
        return masked(self.prompt, start, end, mention)

    def wording(self) -> str | None:
        """Return the same with {} for the subject; None unless the asking part names it once."""
        start, end = asking_part(self.prompt)
        mentions = Mentions((name, 0) for name in self.names).find(self.prompt[start:end])
        if len(mentions) != 1 or "{" in self.prompt:
            return None
        [mention] = mentions
        return masked(self.prompt[start:end], 0, end - start, mention, by="{}")


@dataclass(frozen=True)
class Route:
    """The ``note`` that a prompt is about, -1 for none; from which character on it applies; and how alike both ask."""

    note: int
    at: int
    likeness: float

    def rank(self) -> tuple[float, int]:
        """Return what the best of several routes is found by; none is the last."""
        return (self.likeness, self.note) if self.note >= 0 else (-2.0, -1)


@dataclass(frozen=True)
class _Query:
    """A text to compare, the notes it may be about, and where their subject ends."""

    prompt: int
    text: str
    notes: tuple[int, ...]
    at: int


class Router:
    """Notes by what they are about. ``keys`` (n, d) are the embeddings of their addresses' keys."""

    def __init__(
        self,
        addresses: Sequence[Address],
        keys: Tensor,
        embed: Callable[[Sequence[str]], Tensor],
        metric: RelationMetric,
        *,
        limit: float | None = None,
        strict: float = 0.7,
    ) -> None:
        self._addresses, self._embeddings, self._embed, self._metric = addresses, keys, embed, metric
        self._limit = metric.limit if limit is None else limit
        self._strict = strict

    @cached_property
    def _mentions(self) -> Mentions:
        return Mentions((name, note) for note, address in enumerate(self._addresses) for name in address.names)

    @cached_property
    def _free(self) -> tuple[int, ...]:
        return tuple(note for note, address in enumerate(self._addresses) if not address.names)

    @cached_property
    def _keys(self) -> Tensor:
        return self._metric.project(self._embeddings)

    def routes(self, prompts: Sequence[str]) -> list[Route]:
        """Return where each prompt goes; nothing is embedded if no prompt names a stored subject."""
        queries = [query for number, prompt in enumerate(prompts) for query in self._queries(number, prompt)]
        found = [Route(-1, 0, 0.0)] * len(prompts)
        if not queries:
            return found
        embedded = self._embed([query.text for query in queries])
        for query, embedding, own in zip(queries, embedded, self._metric.project(embedded), strict=True):
            found[query.prompt] = max(found[query.prompt], self._compared(query, embedding, own), key=Route.rank)
        return found

    def _compared(self, query: _Query, embedding: Tensor, own: Tensor) -> Route:
        free = not self._addresses[query.notes[0]].names
        keys, one = (self._embeddings, embedding) if free else (self._keys, own)
        keys = keys[torch.tensor(query.notes, device=keys.device)]
        likeness = keys @ one.to(keys)

        def possible(chosen: Tensor) -> Tensor:
            numbers = chosen.nonzero()[:, 0]
            return numbers if free else numbers[~self._metric.apart(own, keys[numbers]).to(numbers.device)]

        passed = possible(likeness >= (self._strict if free else self._limit))
        if not len(passed):
            return Route(-1, 0, 0.0)
        best = passed[likeness[passed].argmax()]
        # Those that ask for the same thing as the best one: the last of them was written last.
        newest = int(best) if len(keys) == 1 else int(possible(keys @ keys[best] >= _SAME)[-1])
        return Route(query.notes[newest], query.at, float(likeness[best]))

    def _queries(self, number: int, prompt: str) -> list[_Query]:
        mentions = self._mentions.find(prompt)
        if not mentions and not self._free:
            return []
        start, end = asking_part(prompt)
        latest = {mention.owners: mention for mention in mentions if mention.start < end}
        several = sum(mention.start >= start for mention in latest.values()) > 1
        found = []
        for owners, mention in latest.items():
            if mention.start >= start:
                # Of several subjects in one sentence each is asked about by its own clause.
                part = _clause(prompt, start, end, mention) if several else (start, end)
                found.append(_Query(number, masked(prompt, *part, mention), owners, mention.end))
            elif _PRONOUN.search(prompt, start, end):
                found.append(_Query(number, prompt[start:end].strip(), owners, mention.end))
        if self._free:
            found.append(_Query(number, prompt[start:end].strip(), self._free, end))
        return found


def _clause(text: str, start: int, end: int, mention: Mention) -> tuple[int, int]:
    """Return the characters of the clause between ``start`` and ``end`` in which a name stands."""
    borders = list(_CLAUSE.finditer(text, start, end))
    begin = max((match.end() for match in borders if match.end() <= mention.start), default=start)
    return begin, min((match.start() for match in borders if match.start() >= mention.end), default=end)


def asking_part(text: str) -> tuple[int, int]:
    """Return the characters of the last question, or of the sentence that is to be continued, if the text breaks off
    in one; a bare cue behind it ("A:") is neither.
    """
    borders = [match for match in _BREAK.finditer(text) if not _SHORT.search(text, 0, match.start())]
    starts = [0, *(match.end() for match in borders)]
    ends = [*(match.start() for match in borders), len(text)]
    parts = [(start, end) for start, end in zip(starts, ends, strict=True) if _says_something(text[start:end])]
    if not parts:
        return 0, len(text)
    closed = text[slice(*parts[-1])].rstrip("\"')] ").endswith((".", "!"))
    questions = [part for part in parts if text[slice(*part)].rstrip().endswith("?")]
    return questions[-1] if closed and questions else parts[-1]


def _says_something(sentence: str) -> bool:
    words = sentence.split()
    return len(words) > 1 and not (len(words) == 2 and words[-1].endswith(":"))


def masked(text: str, start: int, end: int, mention: Mention | None, by: str = MASK) -> str:
    """Return a part of a text with a name in it replaced."""
    if mention is None or mention.start < start or mention.end > end:
        return text[start:end].strip()
    return (text[start : mention.start] + by + text[mention.end : end]).strip()


def _last(mentions: Sequence[Mention]) -> Mention | None:
    return mentions[-1] if mentions else None
