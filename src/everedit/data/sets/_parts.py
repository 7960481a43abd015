"""What several sets write in the same way."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import as_list, listed, probe


def named(record: dict[str, Any], key: str = "id") -> dict[str, Any]:
    """Return the field that holds a record's name; numbers count from 0, so 0 is one, too."""
    return {"record": str(record[key])} if record.get(key) is not None else {}


def zsre(record: dict[str, Any]) -> dict[str, Any]:
    """Return what all forms of zsRE share: prompt, subject, rephrasing and the wrong fact ``alt`` as the target."""
    return {
        **named(record),
        "prompt": record.get("src"),
        "subject": record.get("subject"),
        "target_new": record.get("alt"),
        "ground_truth": (listed(record.get("answers"), "answer", "others")["answer"]) or None,
        "rephrase": as_list(record.get("rephrase")),
    }


def rewrite(request: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of one ``requested_rewrite`` as in ROME and MQuAKE; the prompt has {} for the subject."""
    subject, new, true = request["subject"], request["target_new"], request.get("target_true") or {}
    return {
        # Not str.format(): a prompt may hold other braces.
        "prompt": request["prompt"].replace("{}", subject),
        "subject": subject,
        "target_new": new["str"],
        "target_id": new.get("id"),
        "ground_truth": true.get("str"),
        "relation": request.get("relation_id"),
        "question": request.get("question"),
    }


def one_hop(value: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the one-hop question of EasyEdit's files as a probe, if the record has one."""
    return [probe(value["New Question"], value["New Answer"], "one_hop")] if value else []


KINDS = {
    "Reasoning": "one_hop",
    "Subject_Aliasing": "alias",
    "Logical_Generalization": "logical",
    "Relation_Specificity": "same_subject",
    "Forgetfulness": "forgetfulness",
}
"""KnowEdit's names of kinds of probes, and ours."""
