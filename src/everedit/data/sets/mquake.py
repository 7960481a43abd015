"""mquake: MQuAKE's multi-hop questions, also MQuAKE-hard: several edits a record, and questions that need them all."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import named, rewrite


def convert(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of a record's edits; the last one carries the questions about all of them."""
    name = named(record, "id" if "id" in record else "case_id").get("record", "")
    requests = record["requested_rewrite"]
    edits = [{**rewrite(request), "record": f"{name}/{place}"} for place, request in enumerate(requests)]
    changed = {request.get("question") for request in requests}
    needs = [
        probe(hop["question"], [hop["answer"], hop.get("answer_alias")], "single_hop")
        for hop in record.get("new_single_hops") or ()
        if hop["question"] not in changed
    ]
    answer = [record["new_answer"], record.get("new_answer_alias")]
    asked = [probe(question, answer, "multi_hop", case=name, needs=needs) for question in record["questions"]]
    return [*edits[:-1], {**edits[-1], "portability": asked}]


SET = DataSet(
    "MQuAKE: questions whose answer follows from several edits made together",
    licence="MQuAKE: MIT; MQuAKE-hard's repository states none",
    convert=convert,
    protocols=("mquake/multi-hop@1", "knowedit/portability@1"),
    files=("mquake_hard/edit.jsonl", "edit.jsonl", "MQuAKE-CF-3k.json", "MQuAKE-CF.json", "MQuAKE-T.json"),
    paper="Zhong et al. 2023; Wang et al. 2024 (DeepEdit)",
    notes="a record's edits recur in others and are made once; its questions are asked from the last of them on",
)
