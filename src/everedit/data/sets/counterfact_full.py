"""counterfact_full: CounterFact in the form of ROME's and MEMIT's code, with paraphrases and neighbouring prompts."""

from __future__ import annotations

from typing import Any

TITLE = "CounterFact in ROME's own form (requested_rewrite, paraphrase_prompts, neighborhood_prompts)"


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit; the prompt of a record has {} where its subject stands."""
    rewrite = record["requested_rewrite"]
    old = (rewrite.get("target_true") or {}).get("str")
    fields: dict[str, Any] = {
        "record": str(record["case_id"]) if "case_id" in record else None,
        # Not str.format(): a prompt may hold other braces.
        "prompt": rewrite["prompt"].replace("{}", rewrite["subject"]),
        "subject": rewrite["subject"],
        "target_new": rewrite["target_new"]["str"],
        "ground_truth": old,
        "relation": rewrite.get("relation_id"),
        "rephrase": record.get("paraphrase_prompts"),
        # Other subjects of which the old answer is true.
        "locality": [
            {"prompt": prompt, "answer": old, "kind": "neighborhood"}
            for prompt in record.get("neighborhood_prompts", ())
        ],
    }
    return {key: value for key, value in fields.items() if value is not None}
