"""known-1000: facts that GPT-2 XL knows, ROME's material for causal tracing; the target is what is true already."""

from __future__ import annotations

from typing import Any

from everedit.data.dataset import DataSet
from everedit.data.sets._parts import named


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a fact as an edit to itself: prompt, subject and the answer that is known."""
    return {
        **named(record, "known_id"),
        "prompt": record.get("prompt"),
        "subject": record.get("subject"),
        "target_new": record.get("attribute"),
        "relation": record.get("relation_id"),
    }


SET = DataSet(
    "known_1000: facts that GPT-2 XL knows, the material of causal tracing",
    licence="MIT",
    convert=convert,
    files=("known_1000/known.jsonl", "known.jsonl", "known_1000.json"),
    paper="Meng et al. 2022",
    notes="the template is only the beginning of many prompts, so the prompt is taken as it is written",
)
