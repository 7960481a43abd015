"""hallucination: WISE's set from SelfCheckGPT's biographies: a passage so far, and the true sentence that follows."""

from __future__ import annotations

from typing import Any

from everedit.data.dataset import DataSet
from everedit.data.sets.counterfact import convert as reduced


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit whose target is a sentence and whose locality probe is web text."""
    fields = reduced(record)
    for probe in fields.get("locality", ()):
        probe["kind"] = "unrelated"
    return fields


SET = DataSet(
    "Hallucinated biographies: a passage so far and its true next sentence (SelfCheckGPT, WISE)",
    licence="file: MIT; WikiBio's text: CC BY-SA",
    convert=convert,
    protocols=("wise/hallucination@1",),
    files=("hallucination/edit.jsonl", "edit.jsonl", "hallucination-edit.json"),
    paper="Manakul et al. 2023; Wang et al. 2024",
    notes="no rephrasings; subjects are lower case, as in the first words of each passage",
)
