"""The text behind the second moments: a file, or samples of the model's own, cut into windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everedit.cache import file_sha256
from everedit.errors import EditError
from everedit.models import LanguageModel

__all__ = ["Corpus"]


@dataclass(frozen=True)
class Corpus:
    """The text that statistics are gathered over, and how much of it.

    ``path`` is a text file (a document a paragraph) or JSONL with a ``text`` field; None means text sampled
    from the model itself. ``tokens`` is how many tokens to read, in windows of ``window_tokens``. ``imported`` is
    the name under which statistics gathered elsewhere were imported: then there is no text to read.
    """

    path: Path | None = None
    tokens: int = 8_192
    window_tokens: int = 512
    seed: int = 0
    imported: str | None = None

    def provenance(self) -> dict[str, Any]:
        """Return what tells this text from any other."""
        if self.imported is not None:
            return {"imported": self.imported}
        if self.path is None:
            source: dict[str, Any] = {"sampled_from_the_model": self.seed}
        else:
            with _readable(self.path):
                source = {"sha256": file_sha256(self.path)}
        return {**source, "tokens": self.tokens, "window_tokens": self.window_tokens}

    def windows(self, lm: LanguageModel) -> Iterator[list[int]]:
        """Yield rows of ``window_tokens`` ids, documents joined by the end token, until ``tokens`` are out.

        A model with a shorter context gets windows of that length.
        """
        rows = _sampled(lm, self) if self.path is None else _read(lm, self.path)
        end, left = lm.tokenizer.eos_token_id, self.tokens
        held: list[int] = []
        window = min(self.window_tokens, lm.context_tokens)
        for row in rows:
            held += [*row, end] if end is not None else row
            while len(held) >= window and left > 0:
                yield held[:window]
                held, left = held[window:], left - window
            if left <= 0:
                return
        if held:
            yield held


def _read(lm: LanguageModel, path: Path) -> Iterator[list[int]]:
    with _readable(path), path.open(encoding="utf-8") as stream:
        for line in stream:
            text = (json.loads(line)["text"] if path.suffix == ".jsonl" else line).strip()
            if text:
                yield lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say of any failure to read a corpus that it is the corpus that cannot be read."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EditError(
            what=f"cannot read the corpus: {error!r}",
            where=str(path),
            fix='give a text file, or JSONL with "text"',
        ) from error


def _sampled(lm: LanguageModel, corpus: Corpus) -> Iterator[list[int]]:
    """Sample texts from the model at temperature 1, many rows at a time."""
    seed = corpus.seed
    start = lm.tokenizer.bos_token_id if lm.tokenizer.bos_token_id is not None else lm.pad_id
    words = [row for word in _OPENINGS if (row := list(lm.encode(word).ids))]
    room = lm.context_tokens - max(map(len, words), default=1)
    # Few tokens come as many short texts, since a step costs about the same for one row as for all.
    rows = 64
    length = min(128, max(32, -(-corpus.tokens // rows)), corpus.window_tokens, room)
    while True:
        begin = [words[(seed * rows + index) % len(words)] or [start] for index in range(rows)]
        # No text ends before its length: the rows that go on would be computed for less.
        sampled = lm.generate_ids(begin, max_new_tokens=length, min_new_tokens=length, top_k=0, seed=seed)
        for prompt, new in zip(begin, sampled, strict=True):
            yield [*prompt, *new]
        seed += 1


_OPENINGS = (
    "The", "In", "A", "When", "It was", "She", "He", "They", "This", "After", "During", "As", "For", "On", "At",
    "Although", "Many", "One", "There", "We", "You", "If", "What is", "How", "Who", "Where", "My", "Our", "New",
    "First", "With", "By", "Some", "People", "Scientists", "The city", "The company", "The river", "The book",
    "The history of", "A long time ago", "Yesterday", "Today", "In 1912", "According to", "Because", "Its", "From",
)  # fmt: skip
