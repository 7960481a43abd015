"""Which of many names a text mentions: whole words, whatever their case, accents and punctuation.

A name is looked up word by word, so that the time grows with the text and not with the number of names.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Mention", "Mentions", "words_of"]

# Signs that belong to names ("C++", "AT&T") are words of their own; full stops, hyphens and quotes only stand between.
_WORD = re.compile(r"[^\W_]+|[+#&$€£%@=*<>]")
_BEHIND = re.compile(r"[ -](?=[^\W\d_])")
# Words that go before a name and do not make it another.
_TITLES = frozenset(["mr", "mrs", "ms", "dr", "prof", "president", "sir", "saint", "the", "in", "of", "at"])


@dataclass(frozen=True)
class Mention:
    """A name's place in a text: the half-open span of characters, and whose name it is."""

    start: int
    end: int
    owners: tuple[int, ...]


@dataclass(frozen=True)
class _Word:
    start: int
    end: int
    folded: str


def words_of(text: str) -> list[_Word]:
    """Return a text's words with their places; scripts without spaces give one word a letter."""
    found = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        if any(unicodedata.category(char) == "Lo" for char in match[0]):
            found += [_Word(at, at + 1, _folded(text[at])) for at in range(start, end)]
        else:
            found.append(_Word(start, end, _folded(match[0])))
    return found


@lru_cache(maxsize=1 << 16)
def _folded(word: str) -> str:
    """Return a word without case and accents."""
    parts = unicodedata.normalize("NFKD", word.casefold())
    return "".join(char for char in parts if not unicodedata.combining(char)) or word


class Mentions:
    """Names, each owned by some numbers."""

    def __init__(self, names: Iterable[tuple[str, int]]) -> None:
        self._owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._lengths: dict[str, set[int]] = defaultdict(set)
        for name, owner in names:
            words = tuple(word.folded for word in words_of(name))
            if words and (not self._owners[words] or self._owners[words][-1] != owner):
                self._owners[words].append(owner)
                self._lengths[words[0]].add(len(words))

    def find(self, text: str) -> list[Mention]:
        """Return the mentions in a text, in its order; of names inside one another the longest counts.

        A name that goes on with a capitalised word ("Paris Hilton" for "Paris"), or begins with one ("New York" for
        "York"), is another's.
        """
        words = words_of(text)
        found: list[Mention] = []
        at = 0
        while at < len(words):
            length = self._longest(words, at)
            if length:
                start, end = words[at].start, words[at + length - 1].end
                owners = self._owners[tuple(word.folded for word in words[at : at + length])]
                if not _part_of_another(text, words, at, start, end):
                    found.append(Mention(start, end, tuple(owners)))
            at += max(1, length)
        return found

    def _longest(self, words: Sequence[_Word], at: int) -> int:
        for length in sorted(self._lengths.get(words[at].folded, ()), reverse=True):
            span = tuple(word.folded for word in words[at : at + length])
            if len(span) == length and span in self._owners:
                return length
        return 0


def _part_of_another(text: str, words: Sequence[_Word], at: int, start: int, end: int) -> bool:
    """Whether a capitalised name touches another capitalised word, with nothing but a space or a hyphen between."""
    if not text[start].isupper() or text[start:end].isupper():
        return False
    if _BEHIND.match(text, end) and text[end + 1].isupper():
        return True
    if at == 0 or text[words[at - 1].end : start] != " " or words[at - 1].folded in _TITLES:
        return False
    # The first word of a sentence is capitalised whatever it is.
    first = words[at - 1].start
    begins = first == 0 or (not text[:first].rstrip(" ")[-1:].isalnum() and text[:first].rstrip(" ")[-1:] != ",")
    return text[first].isupper() and not begins
