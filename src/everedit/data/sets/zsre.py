"""zsre: EasyEdit's and WISE's ZsRE records, edited to ``alt`` as in WISE and SimIE (evaluation.md, part 3)."""

from __future__ import annotations

from typing import Any

TITLE = "ZsRE in EasyEdit's form (src, alt, rephrase, loc, portability)"


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit whose target is ``alt``."""
    fields: dict[str, Any] = {
        "record": str(record["id"]) if "id" in record else None,
        "prompt": record.get("src"),
        "target_new": record.get("alt"),
        "subject": record.get("subject"),
        "ground_truth": (record.get("answers") or [None])[0],
        "rephrase": [record["rephrase"]] if record.get("rephrase") else [],
    }
    if record.get("loc"):
        fields["locality"] = [{"prompt": record["loc"], "answer": record["loc_ans"], "kind": "unrelated"}]
    hop = record.get("portability")
    if hop:
        fields["portability"] = [{"prompt": hop["New Question"], "answer": hop["New Answer"], "kind": "one_hop"}]
    return {key: value for key, value in fields.items() if value is not None}
