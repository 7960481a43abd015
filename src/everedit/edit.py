"""The edit descriptor: what should change, and the probes that show whether it did and what else moved."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from functools import cached_property
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from everedit.errors import EditError

__all__ = ["Edit", "Probe", "clean_text", "fact_key", "subject_span"]

_SPACES = re.compile(r"[\u00a0\u2007\u202f\u2009\u200a\u3000]")


def clean_text(text: str) -> str:
    """Return ``text`` in Unicode NFC, with no-break and other odd spaces plain, LF line ends and no outer space."""
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).replace("\r\n", "\n").replace("\r", "\n").strip()


def _clean(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("the text holds half of a surrogate pair, which is no character")
    return clean_text(value)


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_clean), Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]


class Probe(BaseModel):
    """A prompt with the answer that it should have; ``kind`` names what sort of probe it is.

    ``aliases`` are other right answers, which free text may give. Probes of one ``case`` ask one thing in several ways.
    ``needs`` are the facts beside the edit that an answer rests on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text
    answer: Text
    kind: str = ""
    aliases: Texts = ()
    case: str = ""
    needs: tuple[Probe, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer."""
        return (self.answer, *self.aliases)


class Edit(BaseModel):
    """One edit: after it, the model continues ``prompt`` with ``target_new``.

    ``subject`` is the entity that the fact is about, as it stands in the prompt; methods that locate a fact
    need it. ``ground_truth`` is the answer that was true before. ``rephrase`` asks for the same fact in
    other words; ``locality`` holds prompts whose answer must stay; ``portability`` prompts whose answer
    follows from the new fact. What only some protocols ask for: the prompt as a ``question``, ``generation`` prompts
    that a text is written behind, and ``held_out``, a text that is likely where the edit has been understood.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Text
    target_new: Text
    subject: Text | None = None
    ground_truth: Text | None = None
    rephrase: Texts = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    target_aliases: Texts = Field(default=(), description="other ways to say the target")
    question: Text | None = None
    generation: Texts = ()
    held_out: Text | None = None
    relation: str | None = None
    aliases: Texts = Field(default=(), description="other names of the subject")
    target_id: str | None = Field(default=None, description="the target's name in the knowledge base")
    tags: Texts = Field(default=(), description="what the record says of itself, for selecting")
    record: str | None = Field(default=None, description="the record's name in the file that it comes from")

    @model_validator(mode="after")
    def _subject_is_in_the_prompt(self) -> Edit:
        if self.subject is not None and subject_span(self.prompt, self.subject) is None:
            raise ValueError(f"the subject '{self.subject}' does not occur in the prompt '{self.prompt}'")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Every way to say the target."""
        return (self.target_new, *self.target_aliases)

    @cached_property
    def id(self) -> str:
        """Content id: the same prompt, subject and target give the same id on every machine."""
        parts = json.dumps([self.prompt, self.subject or "", self.target_new], ensure_ascii=False)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    @classmethod
    def parse(cls, record: dict[str, Any], where: str = "") -> Edit:
        """Return a validated edit. Raises :class:`EditError` that names every bad field."""
        try:
            return cls.model_validate(record)
        except ValidationError as error:
            problems = "; ".join(_say(item) for item in error.errors())
            raise EditError(what=problems, where=where, fix="correct the record or leave it out") from error


def _say(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"]) or "record"
    if item["type"] == "missing":
        return f"the field '{field}' is missing"
    if item["type"] in ("string_too_short", "too_short"):
        return f"the field '{field}' is empty"
    if item["type"] == "extra_forbidden":
        return f"the field '{field}' is not known"
    return f"{item['msg'].removeprefix('Value error, ')}" + (f" (field '{field}')" if item["loc"] else "")


def fact_key(edit: Edit) -> tuple[str, str]:
    """Return what an edit is about, without its answer: two edits with one key and two targets contradict."""
    return (edit.prompt.casefold(), (edit.subject or "").casefold())


def subject_span(text: str, subject: str) -> tuple[int, int] | None:
    """Return the character span of the last whole-word occurrence of ``subject`` in ``text``, or None.

    An occurrence inside a longer word does not count ("Rome" in "Romero"); exact case is preferred, then any
    case. Scripts written without spaces have no word borders to respect.
    """
    for haystack, needle in ((text, subject), (_fold(text), _fold(subject))):
        start = haystack.rfind(needle)
        while start >= 0:
            end = start + len(needle)
            if _is_border(haystack, start) and _is_border(haystack, end):
                return start, end
            start = haystack.rfind(needle, 0, end - 1)
    return None


def _fold(text: str) -> str:
    # One character at a time keeps every offset where it is ("İ".lower() has two characters, "ß".casefold() too).
    # Case folding comes first: it makes the two lower-case forms of the Greek sigma one.
    return "".join(
        next((low for low in (char.casefold(), char.lower()) if len(low) == 1), char) for char in _SPACES.sub(" ", text)
    )


def _is_border(text: str, index: int) -> bool:
    """True unless ``index`` lies between two characters of one word."""
    if index in (0, len(text)):
        return True
    return not (_joins(text[index - 1]) and _joins(text[index]))


def _joins(char: str) -> bool:
    # "Lo": letters without case, as in Chinese, Japanese or Thai, where words touch each other.
    return (char.isalnum() or char == "_") and unicodedata.category(char) != "Lo"
