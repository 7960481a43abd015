"""worldfacts: Everedit's own counterfactual edits over common knowledge; ships with the package (Apache-2.0)."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

TITLE = "Everedit's own data set: counterfactual edits of common knowledge"
BUILT_IN = files("everedit.data") / "worldfacts.jsonl"


def convert(record: dict[str, Any]) -> dict[str, Any]:
    """Rename the record's id; the rest has the names of an edit already."""
    return {"record": record.get("id"), **{key: value for key, value in record.items() if key != "id"}}
