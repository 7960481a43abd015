"""plain: a user's own file, with the field names of :class:`everedit.edit.Edit`; the common other names work, too."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import listed, probe, probes
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import KINDS

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
        if kind in given:
            given[kind] = probes(given[kind], KINDS)
        elif prompt is not None:
            given[kind] = [probe(prompt, answer)]
    if isinstance(given.get("target_new"), list):
        given |= listed(given["target_new"], "target_new", "target_aliases")
    if isinstance(given.get("ground_truth"), list):
        given["ground_truth"] = listed(given["ground_truth"], "answer", "others")["answer"] or None
    if "record" in given:
        given["record"] = str(given["record"])
    return given


SET = DataSet(
    "your own JSON, JSONL or CSV with prompt, target_new, subject, …",
    licence="yours",
    convert=convert,
    columns=(("prompt",), ("target_new", "target")),
)
