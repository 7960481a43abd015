"""worldfacts: Everedit's own counterfactual edits over common knowledge; ships with the package (Apache-2.0)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from everedit.data.dataset import DataSet


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Rename the record's id; the rest has the names of an edit already."""
    return {"record": record.get("id"), **{key: value for key, value in record.items() if key != "id"}}


SET = DataSet(
    "Everedit's own data set: counterfactual edits of common knowledge",
    licence="Apache-2.0",
    convert=convert,
    protocols=("wise/lifelong@1", "knowedit/portability@1"),
    built_in=Path(str(files("everedit.data") / "worldfacts.jsonl")),
)
