"""Answers as data sets write them (a text, a list, a list of lists of aliases), and probes with such answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from everedit.edit import clean_text

__all__ = ["answers", "as_list", "listed", "probe", "probes"]


def answers(value: Any) -> list[str]:
    """Return every answer in ``value``, the main one first: texts and numbers in lists of any depth, no empty ones.

    Raises :class:`TypeError` for what is no answer.
    """
    return list(dict.fromkeys(text for text in map(clean_text, _texts(value)) if text))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield str(value)
    elif value is not None:
        raise TypeError(f"an answer is a text or a list of texts, not {value!r}")


def listed(value: Any, main: str, others: str) -> dict[str, Any]:
    """Return the answers in ``value`` as two fields, the main one and the others; an answer that is not there is ""."""
    found = answers(value)
    fields: dict[str, Any] = {main: found[0] if found else ""}
    return {**fields, others: found[1:]} if found[1:] else fields


def as_list(value: Any) -> list[Any]:
    """Return a list as it is, nothing as an empty one, and anything else as its only member."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value in (None, "") else [value]


def probe(prompt: Any, answer: Any, kind: str = "", **more: Any) -> dict[str, Any]:
    """Return the fields of a probe; one without a prompt or an answer is left out where the record is read."""
    return {"prompt": prompt or "", "kind": kind, **listed(answer, "answer", "aliases"), **more}


def probes(value: Any, kinds: Mapping[str, str] | None = None, kind: str = "") -> list[dict[str, Any]]:
    """Return the fields of the probes in ``value``: one, a list of them, or lists by kind, in the common spellings.

    ``kinds`` translates names of kinds. Raises :class:`TypeError` for what is no probe.
    """
    kinds = kinds or {}
    if isinstance(value, dict) and "prompt" not in value:
        return [item for name, part in value.items() for item in probes(part, kinds, kinds.get(name, name))]
    found = []
    for item in as_list(value):
        if not isinstance(item, dict):
            raise TypeError(f"a probe has a prompt and an answer, not {item!r}")
        answer = [item.get("answer", item.get("ground_truth")), item.get("aliases")]
        more = {name: item[name] for name in ("case", "needs") if name in item}
        found.append(probe(item.get("prompt"), answer, item.get("kind") or kind, **more))
    return found
