"""Scores of free texts: how varied they are, how much they share with others (entropy, tf-idf, ROUGE).

Words are runs of letters, digits and inner marks, and every other sign by itself: no tokenizer has to be downloaded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["TfIdf", "fluency", "ngram_entropy", "rouge", "words"]

_WORDS = re.compile(r"\w+(?:['’.\-]\w+)*|[^\w\s]")
_TERMS = re.compile(r"\b\w\w+\b")
_ROUGE_WORDS = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Return the words and the other signs of a text."""
    return _WORDS.findall(text)


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Return H_n = -sum f log2 f in bits, f the frequencies of the n-grams of ``tokens``; 0 where there is none."""
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def fluency(text: str) -> float:
    """Return the generation entropy (2/3 H_2 + 4/3 H_3) / 2 of a text, in bits (ROME; papers print 100 times it).

    Text that repeats itself has less: ordinary English of 100 tokens is at about 6.
    """
    tokens = words(text)
    return (2 / 3 * ngram_entropy(tokens, 2) + 4 / 3 * ngram_entropy(tokens, 3)) / 2


@dataclass(frozen=True)
class TfIdf:
    """Term weights over a corpus of texts: idf(t) = ln((1 + n) / (1 + df(t))) + 1, for terms of two signs or more.

    A text's vector is its term counts times idf; terms that the corpus lacks do not count.
    """

    idf: Mapping[str, float]

    @classmethod
    def fitted(cls, corpus: Iterable[str]) -> TfIdf:
        """Return the weights of a corpus of texts."""
        texts = [set(_terms(text)) for text in corpus]
        found = Counter(term for text in texts for term in text)
        return cls({term: math.log((1 + len(texts)) / (1 + count)) + 1 for term, count in found.items()})

    def cosine(self, one: str, other: str) -> float:
        """Return the cosine of two texts' vectors; 0 where one of them has no known term."""
        first, second = self._vector(one), self._vector(other)
        norms = math.sqrt(sum(v * v for v in first.values())) * math.sqrt(sum(v * v for v in second.values()))
        return sum(value * second.get(term, 0.0) for term, value in first.items()) / norms if norms else 0.0

    def _vector(self, text: str) -> dict[str, float]:
        return {term: count * self.idf[term] for term, count in Counter(_terms(text)).items() if term in self.idf}


def _terms(text: str) -> list[str]:
    return _TERMS.findall(text.lower())


def rouge(text: str, reference: str) -> dict[str, float]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) over lower-case words, without stemming."""
    said, wanted = _ROUGE_WORDS.findall(text.lower()), _ROUGE_WORDS.findall(reference.lower())
    found = {}
    for n in (1, 2):
        one, other = (Counter(zip(*(part[start:] for start in range(n)), strict=False)) for part in (said, wanted))
        found[f"rouge{n}"] = _f1((one & other).total(), one.total(), other.total())
    found["rougeL"] = _f1(_longest_common(said, wanted), len(said), len(wanted))
    return found


def _f1(shared: int, said: int, wanted: int) -> float:
    return 2 * shared / (said + wanted) if shared else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        before = 0
        for place, match in enumerate(other, start=1):
            before, row[place] = row[place], before + 1 if token == match else max(row[place], row[place - 1])
    return row[-1]
