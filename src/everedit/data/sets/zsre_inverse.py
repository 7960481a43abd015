"""zsre-inverse: ZsRE with the reversed relation asked for: given the new object, name the subject."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import zsre


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit with one probe of kind ``inverse``, whose answer is the subject."""
    return {**zsre(record), "portability": [probe(record["inverse question"], record["subject"], "inverse")]}


SET = DataSet(
    "ZsRE with reversed questions (EasyEdit's portability, Inverse Relation)",
    licence="MIT",
    convert=convert,
    protocols=("knowedit/portability@1",),
    files=("zsre/portability_inverse.jsonl", "portability_inverse.jsonl", "zsre_inverse_relation.json"),
    paper="Yao et al. 2023",
    notes="a few prompts spell the subject otherwise: methods that locate it cannot make these edits",
    subject_may_be_elsewhere=True,
)
