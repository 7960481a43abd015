"""qaedit: QAEdit, real questions from NQ, TriviaQA and SimpleQA, for evaluation by free generation."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import as_list, probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import named


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit whose target is the true answer; the tag is the question's origin."""
    return {
        **named(record),
        "prompt": record.get("prompt"),
        "target_new": record.get("target"),
        "subject": record.get("subject"),
        "rephrase": as_list(record.get("rephrase")),
        "locality": [probe(item.get("loc"), item.get("loc_ans"), "unrelated") for item in record.get("locality") or ()],
        "tags": as_list(record.get("source")),
    }


SET = DataSet(
    "QAEdit: real questions with their true answers (The Mirage of Model Editing)",
    licence="Apache-2.0",
    convert=convert,
    protocols=("wild/question@1", "wild/instruction@1", "wild/chat@1", "wild/judged@1", "wise/lifelong@1"),
    files=("qaedit/edit.jsonl", "edit.jsonl", "QAEdit_inter_1k.json", "QAEdit.json"),
    paper="Yang et al. 2025",
    notes="the subject is often missing from the rephrasing",
    subject_may_be_elsewhere=True,
)
