"""temporal: WISE's out-of-distribution set: a paragraph is edited in, and another one on the subject is read."""

from __future__ import annotations

from typing import Any

from everedit.data.dataset import DataSet
from everedit.data.sets.hallucination import convert as with_web_text


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit with a held-out text on its subject."""
    return {**with_web_text(record), "held_out": record.get("ood_rephrase")}


SET = DataSet(
    "Emerging entities: a paragraph to edit in, and another one to be found likely (WISE's temporal set)",
    licence="none stated",
    convert=convert,
    protocols=("wise/temporal@1",),
    files=("temporal/edit.jsonl", "edit.jsonl", "temporal-edit.json"),
    paper="Hewitt et al. 2024; Wang et al. 2024",
    notes="subjects are just the first words of the prompt; in 27 of 75 the held-out text does not name them",
)
