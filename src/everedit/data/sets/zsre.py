"""zsre: EasyEdit's and WISE's ZsRE records, edited to ``alt`` as in WISE and SimIE (evaluation.md, part 3)."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import one_hop, zsre


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit whose target is ``alt``, a wrong fact."""
    unrelated = [probe(record["loc"], record.get("loc_ans"), "unrelated")] if record.get("loc") else []
    return {**zsre(record), "locality": unrelated, "portability": one_hop(record.get("portability"))}


SET = DataSet(
    "ZsRE edited to `alt`, a wrong fact, as in WISE, SimIE and GRACE",
    licence="EasyEdit's file: MIT; zsRE itself states none",
    convert=convert,
    protocols=("wise/lifelong@1", "knowedit/portability@1"),
    files=("zsre/edit.jsonl", "edit.jsonl", "zsre_mend_edit.json", "zsre_mend_eval.json"),
    paper="Levy et al. 2017; Mitchell et al. 2022; Wang et al. 2024",
    notes="1037 records name 743 subjects, and many contradict an earlier one in other words",
)
