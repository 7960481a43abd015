"""counterfact: CounterFact, in EasyEdit's reduced form or in that of ROME's own code; a record tells which it is."""

from __future__ import annotations

from typing import Any

TITLE = "CounterFact in EasyEdit's reduced form (prompt, rephrase_prompt, …) or in ROME's (requested_rewrite, …)"


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit."""
    fields = _full(record) if "requested_rewrite" in record else _reduced(record)
    return {key: value for key, value in fields.items() if value is not None}


def requested(rewrite: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ROME's and MEMIT's request dictionary: a ``prompt`` with ``{}`` for its ``subject``, and
    ``target_new`` and ``target_true`` as ``{"str": …}``.
    """
    old = rewrite.get("target_true")
    return {
        "prompt": rewrite["prompt"].replace("{}", rewrite["subject"]),
        "subject": rewrite["subject"],
        "target_new": rewrite["target_new"]["str"],
        "ground_truth": old["str"] if old else None,
        "relation": rewrite.get("relation_id"),
    }


def _full(record: dict[str, Any]) -> dict[str, Any]:
    fields = requested(record["requested_rewrite"])
    old = fields["ground_truth"]
    return {
        **fields,
        "record": str(record["case_id"]) if "case_id" in record else None,
        "rephrase": record.get("paraphrase_prompts", []),
        # Other subjects of which the old answer is true.
        "locality": [
            {"prompt": prompt, "answer": old, "kind": "neighborhood"}
            for prompt in record.get("neighborhood_prompts", ())
        ],
    }


def _reduced(record: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "record": str(record["id"]) if "id" in record else None,
        **{name: record.get(name) for name in ("prompt", "target_new", "subject", "ground_truth")},
        "rephrase": [record["rephrase_prompt"]] if record.get("rephrase_prompt") else [],
    }
    if record.get("locality_prompt"):
        answer = record["locality_ground_truth"]
        fields["locality"] = [{"prompt": record["locality_prompt"], "answer": answer, "kind": "same_relation"}]
    return fields
