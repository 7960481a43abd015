"""counterfact: CounterFact in EasyEdit's reduced form, one rephrasing and one neighbouring prompt a record."""

from __future__ import annotations

from typing import Any

TITLE = "CounterFact in EasyEdit's reduced form (prompt, target_new, rephrase_prompt, locality_prompt)"


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit."""
    fields: dict[str, Any] = {
        "record": str(record["id"]) if "id" in record else None,
        **{name: record.get(name) for name in ("prompt", "target_new", "subject", "ground_truth")},
        "rephrase": [record["rephrase_prompt"]] if record.get("rephrase_prompt") else [],
    }
    if record.get("locality_prompt"):
        answer = record["locality_ground_truth"]
        fields["locality"] = [{"prompt": record["locality_prompt"], "answer": answer, "kind": "same_relation"}]
    return {key: value for key, value in fields.items() if value is not None}
