"""Write ``report.html`` for a whole sweep: its tables, curves and cells, in one page that needs no network."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from everedit.errors import RunFolderError
from everedit.report.collect import collect
from everedit.report.drawing import inline_svg
from everedit.report.line_figures import Drawn
from everedit.report.pages import REPORT_NAME, readable, write_page
from everedit.report.results import mapping
from everedit.report.run_files import Record, load_object
from everedit.report.sweep_figures import figures
from everedit.report.sweep_files import CELLS, ERROR, MANIFEST, cell_status, read_if_there, why_failed
from everedit.report.tables import Table, tables
from everedit.report.wording import explain

__all__ = ["is_sweep", "write_sweep_report"]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / MANIFEST).exists()


def write_sweep_report(folder: Path) -> Path:
    """Write the HTML page of a sweep, finished or not, and return its path (``report.html`` in its folder).

    Raises:
        RunFolderError: the folder holds no sweep, a file in it is malformed, or the page cannot be written.
        EvereditError: the ``report`` extra is not installed.
    """
    manifest = load_object(folder / MANIFEST)
    if manifest is None:
        raise RunFolderError(
            what="there is no sweep here", where=str(folder), fix="give the folder that `everedit sweep` wrote"
        )
    return write_page(folder / REPORT_NAME, "sweep.html.j2", lambda: _page(folder, manifest))


def _page(folder: Path, manifest: Record) -> dict[str, Any]:
    cells = [_cell(folder, manifest, cell) for cell in manifest.get("cells", [])]
    results = collect([folder]) if any((folder / CELLS / cell["name"]).is_dir() for cell in cells) else []
    counts = Counter(cell["status"] for cell in cells)
    return {
        "title": readable(manifest.get("title") or folder.name),
        "lead": ", ".join(f"{count} {status}" for status, count in counts.items()),
        "facts": _facts(cells),
        "failures": [cell for cell in cells if cell["status"] == "failed"],
        "tables": [_table(table) for table in tables(results)],
        "figures": [_figure(drawn, number) for number, drawn in enumerate(figures(results))],
        "reproduction": _reproduction(folder),
        "axes": _varied(cells),
        "cells": cells,
        "command": readable(manifest.get("command")),
        "source": readable(manifest.get("source")),
        "made": [
            ("made with", f"everedit {manifest.get('everedit', '–')}"),
            ("begun", str(manifest.get("created", "–"))),
            ("threads a cell", str(manifest.get("threads", "–"))),
        ],
    }


def _reproduction(folder: Path) -> dict[str, Any] | None:
    """Return what a recipe expected of the sweep and what was found, if it was made by one."""
    kept = load_object(folder / "reproduction.json")
    if kept is None:
        return None
    lines = [{key: readable(value) for key, value in mapping(line).items()} for line in kept.get("lines", [])]
    texts = [kept.get("paper"), kept.get("about"), *kept.get("notes", [])]
    counts = Counter(str(line.get("verdict")) for line in lines)
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return {"lines": lines, "texts": [readable(text) for text in texts], "said": said}


def _cell(folder: Path, manifest: Record, cell: Record) -> dict[str, Any]:
    name, axes = str(cell.get("name")), mapping(cell.get("axes"))
    place = folder / CELLS / name
    skipped = str(cell.get("skipped") or "")
    status = cell_status(place, str(manifest.get("kind")), skipped)
    error = read_if_there(place / ERROR) if status == "failed" else {}
    page = place / REPORT_NAME
    return {
        "name": name,
        "axes": {axis: readable(value) for axis, value in axes.items()},
        # No process is at work on a page's cells: those that wait were begun, or not yet.
        "status": "unfinished" if status == "waiting" else status,
        "note": readable(why_failed(place) if error else skipped),
        "where": readable(error.get("where")),
        "fix": readable(error.get("fix")),
        "link": f"{CELLS}/{name}/{REPORT_NAME}" if page.exists() else None,
    }


def _facts(cells: list[dict[str, Any]]) -> list[tuple[str, str]]:
    facts = [("Cells", f"{len(cells):,}")]
    for axis, called in (("model", "Models"), ("data", "Data"), ("method", "Methods"), ("policy", "Policies")):
        values = dict.fromkeys(cell["axes"].get(axis, "–") for cell in cells)
        facts.append((called, ", ".join(Path(value).name if axis == "model" else value for value in values)))
    seeds = dict.fromkeys(cell["axes"].get("seed", "–") for cell in cells)
    return [*facts, ("Seeds", ", ".join(seeds))]


def _varied(cells: list[dict[str, Any]]) -> list[str]:
    """Return the axes on which cells differ; the method, if on none."""
    axes = list(cells[0]["axes"]) if cells else []
    return [axis for axis in axes if len({cell["axes"][axis] for cell in cells}) > 1] or axes[2:3]


def _table(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "note": table.note,
        "explanation": explain(table.protocol, table.explanation),
        "marks": table.marks,
        "heads": table.heads(),
        "rows": list(table.cells(3)),
        "intervals": list(table.cells(3, interval=True)),
        "has_intervals": any(entry.low is not None for _, entries in table.rows for entry in entries.values()),
    }


def _figure(drawn: Drawn, number: int) -> dict[str, str]:
    svg = inline_svg(drawn.figure, f"fig-{number}", drawn.heading, drawn.describe)
    return {"svg": svg, "heading": drawn.heading, "caption": drawn.caption}
