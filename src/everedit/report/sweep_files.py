"""What lies in a sweep's folder, and how far each of its cells is: read off the folders, never kept twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "ANSWERS",
    "CELLS",
    "ERROR",
    "MANIFEST",
    "PROGRESS",
    "VALUES",
    "Status",
    "cell_status",
    "read_if_there",
    "why_failed",
]

MANIFEST, CELLS, ANSWERS, VALUES = "sweep.json", "cells", "answers", "values"
ERROR, PROGRESS = "error.json", "progress.json"
_RESULTS = {"run": "summary.json", "rollback": "rollback.json"}

Status = Literal["waiting", "running", "done", "failed", "skipped"]


def cell_status(folder: Path, kind: str, skipped: str = "") -> Status:
    """Return how far a cell of a sweep of a ``kind`` is; its folder cannot tell whether a process is at work on it."""
    if skipped:
        return "skipped"
    if (folder / _RESULTS.get(kind, _RESULTS["run"])).exists():
        return "done"
    return "failed" if (folder / ERROR).exists() else "waiting"


def why_failed(folder: Path) -> str:
    """Return in one line why a cell failed."""
    found = read_if_there(folder / ERROR)
    return f"{found.get('error', 'failed')}: {found.get('what', 'unknown')}"


def read_if_there(file: Path) -> dict[str, Any]:
    """Return the object in a small file that may not be there, or not yet."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
