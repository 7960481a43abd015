"""knowedit-wikibio: KnowEdit's biographies: a passage so far, its true next sentence, locality of the same person."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import probes
from everedit.data.sets._knowedit import part
from everedit.data.sets._parts import KINDS, named


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit whose target is a sentence."""
    return {
        **named(record),
        "prompt": record.get("text"),
        "target_new": record.get("labels"),
        "subject": record.get("concept"),
        "locality": probes(record.get("locality") or {}, KINDS),
    }


SET = part(
    "KnowEdit's WikiBio: a passage so far and its true next sentence",
    ("knowedit/wikibio.jsonl", "wikibio.jsonl", "wikibio-test-all.json"),
    "WikiBio/wikibio-test-all.json",
    convert=convert,
    protocols=("wise/hallucination@1",),
    notes="shares records with hallucination: never count the two as independent",
)
