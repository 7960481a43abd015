"""zsre-alias: ZsRE asked about another name of the subject."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import zsre


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit with one probe of kind ``alias``, whose answer is the target."""
    return {**zsre(record), "portability": [probe(record["alter_subject_question"], record["alt"], "alias")]}


SET = DataSet(
    "ZsRE asked about another name of the subject (EasyEdit's portability, Subject Replace)",
    licence="MIT",
    convert=convert,
    protocols=("knowedit/portability@1",),
    files=("zsre/portability_alias.jsonl", "portability_alias.jsonl", "zsre_subject_replace.json"),
    paper="Yao et al. 2023",
    notes="a few prompts spell the subject otherwise: methods that locate it cannot make these edits",
    subject_may_be_elsewhere=True,
)
