"""plain: a user's own file, with the field names of :class:`everedit.edit.Edit`; the common other names work, too."""

from __future__ import annotations

from typing import Any

TITLE = "your own JSON, JSONL or CSV with prompt, target_new, subject, …"

_SYNONYMS = {
    "target": "target_new",
    "target_true": "ground_truth",
    "rephrase_prompt": "rephrase",
    "rephrase_prompts": "rephrase",
    "id": "record",
}


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit; empty cells count as missing, flat locality columns become a probe."""
    given = {_SYNONYMS.get(key, key): value for key, value in record.items() if value not in (None, "")}
    for kind in ("locality", "portability"):
        prompt, answer = given.pop(f"{kind}_prompt", None), given.pop(f"{kind}_answer", None)
        answer = answer or given.pop(f"{kind}_ground_truth", None)
        if prompt is not None:
            given[kind] = [{"prompt": prompt, "answer": answer or ""}]
    if "record" in given:
        given["record"] = str(given["record"])
    return given
