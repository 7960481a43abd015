"""A sheet of sentences turned into proposed edits: where the answer begins and whom it is about, found by their form.

"The capital of Australia is Lisbon." becomes prompt "The capital of Australia is", subject "Australia", target
"Lisbon". The rules know English word forms and capital letters, no meaning: what they are unsure of is said, and every
proposal is for a person to read before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everedit.data.records import read_text, records
from everedit.edit import Edit, clean_text, subject_span
from everedit.errors import EditError

__all__ = ["Proposal", "proposals", "propose"]

_WORD = re.compile(r"[^\s]+")
_BE = ("is", "are", "was", "were", "be", "been", "remains", "became", "becomes")
_ARTICLES = ("a", "an", "the", "his", "her", "its", "their", "this", "that", "these", "those")
_LINKS = (
    *_BE, *_ARTICLES, "in", "at", "of", "on", "by", "to", "from", "as", "for", "with", "into", "under", "near", "after",
    "named", "called", "like", "has", "have", "had", "and", "or", "not", "speaks", "plays", "played", "uses", "likes",
    "makes",
)  # fmt: skip
_INSIDE_NAMES = (
    "of", "the", "de", "la", "le", "van", "von", "der", "den", "da", "di", "du", "del", "al", "and", "&", "for",
)  # fmt: skip
_FIRST_WORDS = (
    *_LINKS, "who", "what", "where", "when", "which", "whose", "how", "why", "it", "he", "she", "they", "there",
    "during", "before", "since", "both", "every", "all", "some", "one", "i", "we", "you", "if", "although", "while",
)  # fmt: skip
_MONTHS = (
    "january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november",
    "december",
)  # fmt: skip
_OUTER = "\"'“”‘’()[]{},;:?"


@dataclass(frozen=True)
class Proposal:
    """A sentence of a sheet, the edit that it may mean, and what to look at before it is used."""

    line: int
    sentence: str
    edit: Edit
    doubts: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """Return the record to be written for a person to correct: doubts stand in its tags."""
        fields = self.edit.model_dump(mode="json", exclude_defaults=True)
        return {**fields, "tags": [f"check: {doubt}" for doubt in self.doubts]} if self.doubts else fields


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int

    @property
    def bare(self) -> str:
        """The word without quotes, brackets, commas and the possessive."""
        return re.sub(r"['’]s?$", "", self.text.strip(_OUTER))

    @property
    def is_name(self) -> bool:
        """Whether it begins like a proper name or a number."""
        return bool(self.bare) and (self.bare[0].isupper() or self.bare[0].isdigit())

    @property
    def ends_phrase(self) -> bool:
        """Whether a name cannot go on behind it: a comma, a closing bracket or a possessive."""
        return self.text[-1:] in ",;:)" or self.text.rstrip(_OUTER) != self.text or self.bare != self.text.strip(_OUTER)


def proposals(path: Path) -> Iterator[Proposal | EditError]:
    """Yield a proposal for each sentence of a sheet, or the error that says why there is none.

    A ``.txt`` file holds a sentence a line; a CSV or JSONL file has a ``sentence``, and a ``target`` or ``subject``
    where they are known. Raises :class:`EditError` if the sheet cannot be read as a whole.
    """
    for line, record, problem in _rows(path):
        try:
            if problem or not isinstance(record, dict) or not str(record.get("sentence") or "").strip():
                raise EditError(what=problem or "there is no sentence", where=f"line {line}", fix="write one")
            given = {name: str(record[name]) for name in ("target", "subject") if record.get(name)}
            yield propose(str(record["sentence"]), line, **given)
        except EditError as error:
            yield EditError(what=error.what, where=f"line {line}", fix=error.fix)


def _rows(path: Path) -> Iterator[tuple[int, Any, str]]:
    if path.suffix.lower() != ".txt":
        yield from records(path, (("sentence",),))
        return
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            yield line, {"sentence": text}, ""


def propose(sentence: str, line: int = 0, *, target: str | None = None, subject: str | None = None) -> Proposal:
    """Return the edit that a sentence may mean; ``target`` and ``subject`` are not looked for where they are given.

    Raises :class:`EditError` if the sentence has no place for an answer, or does not end in the one given.
    """
    doubts: list[str] = []
    text = clean_text(sentence).rstrip(".!… ").rstrip(_OUTER if target is None else "")
    if target is not None:
        span = subject_span(text, clean_text(target))
        if span is None or text[span[1] :].strip(_OUTER + " .!?"):
            raise EditError(
                what=f"the sentence does not end in the target {target!r}",
                where=sentence,
                fix="put the target at the end, or write the record by hand",
            )
        begin = span[0]
    else:
        begin = _answer_start(text, doubts)
    prompt, answer = text[:begin].rstrip().rstrip('"“‘('), text[begin:].strip(_OUTER + " ")
    if not any(map(str.isalnum, prompt)) or not answer:
        raise EditError(
            what="no answer can be told apart from the rest", where=sentence, fix="give it in a column `target`"
        )
    found = subject or _subject(prompt, doubts)
    fields = {"prompt": prompt, "target_new": answer, "subject": found}
    return Proposal(line, sentence, Edit.parse(fields, where=sentence), tuple(doubts))


def _words(text: str) -> list[_Word]:
    return [_Word(found.group(), found.start(), found.end()) for found in _WORD.finditer(text)]


def _answer_start(text: str, doubts: list[str]) -> int:
    """Return where the answer begins: at the name that ends the text, or behind the last word that leads to one.

    Behind a question, "It is" and the like still belong to the prompt.
    """
    words = _words(text)
    asked = next((at + 1 for at, word in enumerate(words[:-1]) if word.text.endswith("?")), 0)
    place = len(words)
    # A name at the end: capital letters and figures, with small words only between two of them.
    while place > max(1, asked) and (words[place - 1].is_name or _joins_names(words, place - 1)):
        if place < len(words) and words[place - 1].ends_phrase:
            break
        place -= 1
    while place < len(words) and not words[place].is_name:
        place += 1
    if place < len(words):
        if place <= 1:
            doubts.append("everything is a name: the answer is only a guess")
            place = len(words) - 1
        return words[place].start
    links = [at for at, word in enumerate(words[:-1]) if at >= asked and word.bare.casefold() in _LINKS]
    if asked and not links:
        return words[asked].start
    if not links:
        doubts.append("no word leads to the answer: the last one is taken")
        return words[-1].start if words else 0
    return words[links[-1] + 1].start


def _joins_names(words: list[_Word], at: int) -> bool:
    """Whether a small word stands inside a name ("Republic of the Congo"), not before one ("lives in Rome")."""
    behind = next((word for word in words[at + 1 :] if word.bare not in _INSIDE_NAMES), None)
    before = next((word for word in reversed(words[:at]) if word.bare not in _INSIDE_NAMES), None)
    small = words[at].bare in _INSIDE_NAMES and not words[at].ends_phrase
    inside = behind is not None and behind.is_name and before is not None and before.is_name
    # Sentences begin with a capital letter that makes no name.
    return small and inside and before is not words[0] and words[at].bare != "and"


def _subject(prompt: str, doubts: list[str]) -> str:
    """Return the first name in a prompt, else the words that the prompt seems to be about."""
    words = _words(prompt)
    names = list(_names(words, prompt))
    proper = [name for name in names if not name[0].isdigit() and name.casefold() not in _MONTHS]
    led_in = re.match(r"(?:in|at|on|during|after|before|since|among)\b[^,]*,", prompt, re.IGNORECASE)
    if led_in:
        # "In the United States, the capital of Illinois is" is about Illinois.
        proper.sort(key=lambda name: name in led_in.group())
    if proper or names:
        if len(dict.fromkeys(proper)) > 1:
            doubts.append(f"several names: {', '.join(dict.fromkeys(proper))}")
        return (proper or names)[0]
    doubts.append("no name in the prompt: the subject is only a guess")
    plain = [word for word in words if word.bare]
    ofs = [at for at, word in enumerate(plain[:-1]) if word.bare == "of"]
    verbs = [at for at, word in enumerate(plain) if word.bare.casefold() in _BE]
    start = ofs[-1] + 1 if ofs and (not verbs or ofs[-1] < verbs[0] - 1) else 0
    end = next((at for at in verbs if at > start), min(len(plain), start + 2))
    while start < end - 1 and plain[start].bare.casefold() in _FIRST_WORDS:
        start += 1
    return prompt[plain[start].start : plain[end - 1].end].strip(_OUTER)


def _names(words: list[_Word], prompt: str) -> Iterator[str]:
    """Yield the proper names of a prompt in their order, as they stand there."""
    at = 0
    while at < len(words):
        begins = words[at].is_name and not (at == 0 and words[at].bare.casefold() in _FIRST_WORDS)
        if not begins:
            at += 1
            continue
        end = at
        while not words[end].ends_phrase and end + 1 < len(words):
            following = end + 1
            while following < len(words) - 1 and words[following].bare in _INSIDE_NAMES and following - end < 3:
                following += 1
            if not words[following].is_name:
                break
            end = following
        last = words[end]
        name = prompt[words[at].start : last.start + last.text.find(last.bare) + len(last.bare)].lstrip(_OUTER)
        if name.count("(") > name.count(")"):
            name += ")"
        if name in prompt:
            yield name
        at = end + 1
