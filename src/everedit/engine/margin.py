"""Notes beside a model: a book of vectors with their addresses, and what each prompt's note adds behind a block."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from everedit.engine.beside import Memory
from everedit.engine.router import Address, Router
from everedit.engine.state import State
from everedit.models import LanguageModel
from everedit.models.calls import Call, watching
from everedit.models.hooks import changed_output

__all__ = ["Book", "Margin"]


@dataclass(frozen=True)
class Book:
    """n notes: vectors ``notes`` (n, H), ``keys`` (n, d) embedded, and the ``text`` of a JSON object each, a line."""

    notes: Tensor
    keys: Tensor
    text: Tensor

    @classmethod
    def of(cls, state: State) -> Book | None:
        """Return the book of a state; None if nothing is written yet."""
        parts = state.tensors
        return cls(parts["notes"], parts["keys"], parts["text"].cpu()) if "notes" in parts else None

    @classmethod
    def written(cls, notes: Tensor, keys: Tensor, addresses: Sequence[Address]) -> Book:
        """Return a book of new notes."""
        lines = (json.dumps({"names": a.names, "prompt": a.prompt}, ensure_ascii=False) + "\n" for a in addresses)
        return cls(notes, keys, torch.frombuffer(bytearray("".join(lines).encode()), dtype=torch.uint8))

    def state(self) -> State:
        """Return the book as a method's state."""
        return State({"notes": self.notes, "keys": self.keys, "text": self.text}, {"notes": len(self.notes)})

    @cached_property
    def addresses(self) -> list[Address]:
        """What each note is about."""
        lines = bytes(self.text.tolist()).decode().splitlines()
        return [Address(tuple(row["names"]), row["prompt"]) for row in map(json.loads, lines)]

    def joined(self, other: Book) -> Book:
        """Return a book with this one's notes and then the other's."""
        pairs = ((self.notes, other.notes), (self.keys, other.keys), (self.text, other.text))
        return Book(*(torch.cat([mine, theirs.to(mine)]) for mine, theirs in pairs))


@dataclass
class Margin(Memory):
    """A book beside a model: what each prompt's note adds behind a block."""

    layer: int
    book: Book
    router: Router
    onward: bool

    @contextmanager
    def attached(self, lm: LanguageModel) -> Iterator[None]:
        """Let notes add to the block's output."""
        with watching(lm) as watcher:

            def change(_: Tensor, output: Tensor) -> Tensor:
                return self._annotated(lm, watcher.now, output)

            with changed_output(lm.layout.block(self.layer), change):
                yield

    def _annotated(self, lm: LanguageModel, call: Call, output: Tensor) -> Tensor:
        places = call.decided("marginalia", lambda: self.places(lm, call).to(output.device))
        note, start = places[:, 0], places[:, 1]
        columns = torch.arange(call.real.shape[1], device=output.device)
        # Behind the prompt every token is behind the subject.
        first = start if call.begins else torch.zeros_like(start)
        reached = columns >= first[:, None] if self.onward else (columns == first[:, None]) & call.begins
        reached = reached & (note >= 0)[:, None] & call.real
        if not bool(reached.any()):
            return output
        added = self.book.notes[note.clamp_min(0)].to(output.dtype)[:, None]
        return torch.where(reached[..., None], output + added, output)

    def places(self, lm: LanguageModel, call: Call) -> Tensor:
        """Return each row's note, -1 for none, and the column from which it is added, (rows, 2)."""
        found = torch.full((len(call.real), 2), -1, dtype=torch.long)
        if call.ids is None:
            # What comes as embeddings has no text.
            return found
        rows = [ids[real].tolist() for ids, real in zip(call.ids, call.real, strict=True)]
        routes = self.router.routes([_text(lm, ids) for ids in rows])
        for row, (ids, route) in enumerate(zip(rows, routes, strict=True)):
            if route.note >= 0:
                begin = int(call.real[row].int().argmax())
                found[row] = torch.tensor([route.note, begin + _token_at(lm, ids, route.at)])
        return found


def _text(lm: LanguageModel, ids: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _token_at(lm: LanguageModel, ids: Sequence[int], end: int) -> int:
    """Return the first token with which a text reaches ``end`` characters."""
    low, high = 0, len(ids) - 1
    while low < high:
        middle = (low + high) // 2
        if len(_text(lm, ids[: middle + 1])) >= end:
            high = middle
        else:
            low = middle + 1
    return low
