"""counterfact: CounterFact in EasyEdit's reduced form, one rephrasing and one neighbouring prompt a record."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import as_list, probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import named


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit."""
    fields: dict[str, Any] = {
        **named(record),
        **{name: record.get(name) for name in ("prompt", "target_new", "subject", "ground_truth")},
        "rephrase": as_list(record.get("rephrase_prompt")),
    }
    if record.get("locality_prompt"):
        answer = record.get("locality_ground_truth")
        fields["locality"] = [probe(record["locality_prompt"], answer, "same_relation")]
    return fields


SET = DataSet(
    "CounterFact in EasyEdit's reduced form (prompt, target_new, rephrase_prompt, locality_prompt)",
    licence="MIT",
    convert=convert,
    protocols=("wise/lifelong@1", "rome/counterfact@1"),
    files=("counterfact/edit.jsonl", "edit.jsonl", "counterfact-edit.json"),
    paper="Meng et al. 2022; Wang et al. 2024",
    notes="one rephrasing and one neighbour a record: PS and NS are coarser than over ROME's 2 and 10",
)
