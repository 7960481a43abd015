"""zsre-true: ZsRE edited to the true answer, as in ROME, MEMIT and AlphaEdit (evaluation.md, part 3)."""

from __future__ import annotations

from typing import Any

from everedit.data.answers import listed, probe
from everedit.data.dataset import DataSet
from everedit.data.sets._parts import zsre


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit whose target is the first of ``answers``; the specificity prompt gets its "?"."""
    fields = {**zsre(record), "ground_truth": None, **listed(record.get("answers"), "target_new", "target_aliases")}
    loc = str(record.get("loc") or "").strip()
    if loc:
        asked = loc if loc.endswith("?") else f"{loc}?"
        fields["locality"] = [probe(asked, record.get("loc_ans"), "unrelated")]
    return fields


SET = DataSet(
    "ZsRE edited to the true answer, as in ROME, MEMIT, AlphaEdit and NAS",
    licence="EasyEdit's file: MIT; zsRE itself states none",
    convert=convert,
    protocols=("memit/zsre@1",),
    files=("zsre/edit.jsonl", "edit.jsonl", "zsre_mend_eval.json", "zsre_mend_edit.json"),
    paper="Levy et al. 2017; Meng et al. 2022, 2023",
    notes="scores of the unedited model are far from 0: it knows some of the answers; the files' one-hop questions "
    "rest on `alt` and are not asked",
)
