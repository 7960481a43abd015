"""Pages of docs/results that are sweeps: their file, their tables, their curves, and all their numbers as CSV.

    python -m benchmarks.sweep_pages NAME [--data DATA_FOLDER] [--out docs/results] [--jobs 1] [--minutes M]

The sweep is ``benchmarks/sweeps/NAME.yaml``; ``NAME.md`` beside it, if there is one, is what the page says before its
tables. Runs are kept in ``.benchmarks/sweeps/NAME``, and the numbers of those that came to their end in
``OUT/NAME.csv``: a cell that stands there is not made again unless its settings change (or with ``--anew``).
Interrupted, also by ``--minutes``, a page goes on where it was; it is written each time.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from benchmarks import page_rows
from benchmarks.page_rows import ABILITY, SINGLE, Row
from everedit.errors import RunFolderError
from everedit.experiments.sweeps import (
    Cell,
    CellState,
    LocalWorkers,
    Manifest,
    SweepConfig,
    SweepFolder,
    cells_of,
    drive,
)
from everedit.report.collect import results_of_run
from everedit.report.sweep_figures import save
from everedit.report.sweep_files import CELLS, VALUES
from everedit.report.tables import markdown

SWEEPS = Path(__file__).parent / "sweeps"
KEPT = Path(".benchmarks/sweeps")
DATA = Path(".benchmarks/data")
# Made of lines of the data and kept beside it: a stream longer than one file holds, and what it leaves to learn from.
JOINED = {
    "zsre_long.jsonl": (("zsre/edit.jsonl", slice(None)), ("zsre/train.jsonl", slice(400))),
    "zsre_rest.jsonl": (("zsre/train.jsonl", slice(400, None)),),
}
# Editors that another page has measured, with the same records and settings, and that a page shows beside its own.
BESIDE = {
    "marginalia": {"streams": ("MEMIT", "MEMIT + SimIE", "AlphaEdit"), "memories": ("WISE-Retrieve",)},
}
GROWTH = """\
Norm and largest singular value after T edits, as multiples of the unedited matrix's, of the matrix that grew most; in
roll-back runs how many updates were ten times the median of those before (flashes), the last by the first (buildup)."""
TABLES = {
    SINGLE: "Single edits, each taken back before the next",
    "retained": "All T edits, with the model as it is after T",
    "uncontradicted": "The same, without edits that a later one contradicts",
    "first_100": "The first hundred edits, with the model as it is after T",
    ABILITY: "General ability, with the model as it is after T",
}


def page(name: str, rows: Sequence[Row], waiting: int, out: Path) -> list[str]:
    """The lines of the page; its figures are written beside it."""
    foreword = SWEEPS / f"{name}.md"
    lines = [
        foreword.read_text(encoding="utf-8").strip() if foreword.exists() else f"# {name}",
        "",
        f"Made by `python -m benchmarks.sweep_pages {name}`; every number stands in [{name}.csv]({name}.csv).",
    ]
    if waiting:
        lines[-1] += f" {waiting} runs of the sweep below are still to be made."
    lines += ["", "```yaml", (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8").strip(), "```"]
    all_of_them = markdown(page_rows.tables_of(rows, "retained"))
    for when, heading in TABLES.items():
        found = page_rows.tables_of(rows, when)
        # Where nothing contradicts anything, the second table would be the first.
        same = [replace(table, when="retained") for table in found] if when == "uncontradicted" else []
        if found and not (same and markdown(same) == all_of_them):
            lines += ["", f"## {heading}", "", markdown(found).strip()]
    if found := page_rows.tables_of(rows, "immediate"):
        lines += ["", "## Right after each edit, mean of the first T, with 95% bootstrap intervals", ""]
        lines.append(markdown(found, interval=True).strip())
    if not rows:
        return lines
    if grown := page_rows.growth_of(rows):
        lines += ["", "## How the weights grew", "", GROWTH, *grown]
    lines += ["", "## What an edit costs, scoring left out", "", *page_rows.costs_of(rows), ""]
    for old in (out / name).glob("*.svg"):
        old.unlink()
    for number, drawn in enumerate(page_rows.curves_of(rows)):
        lines += ["## Curves", ""] if not number else []
        save(drawn, out / name)
        lines += [f"![{drawn.heading}]({name}/{drawn.slug}.svg)", "", f"*{drawn.caption}*", ""]
    return lines


def cells(name: str, data: Path) -> tuple[SweepConfig, list[Cell]]:
    """The sweep and its cells."""
    file = placed(name, data)
    sweep = SweepConfig.read(file)
    return sweep, cells_of(sweep, str(file))


def placed(name: str, data: Path) -> Path:
    """The sweep's file with its data in one place everywhere, so that the digests of its cells agree."""
    DATA.parent.mkdir(parents=True, exist_ok=True)
    if data.exists():
        DATA.unlink(missing_ok=True)
        DATA.symlink_to(data.resolve(), target_is_directory=True)
        for joined, parts in JOINED.items():
            if all((data / part).exists() for part, _ in parts):
                lines = [line for part, lines in parts for line in (data / part).read_bytes().splitlines(True)[lines]]
                (DATA.parent / joined).write_bytes(b"".join(lines))
    file = KEPT / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = (SWEEPS / file.name).read_text(encoding="utf-8")
    file.write_text(re.sub(r"\bDATA\b", str(DATA), text), encoding="utf-8")
    return file


def beside(name: str, rows: Sequence[Row], out: Path) -> list[Row]:
    """Return the numbers of other pages' editors where this page has numbers of the same kind, after as many edits."""

    def kind(row: Row) -> tuple[object, ...]:
        # What an edit cost stands at a stream's end, wherever that is.
        return row.model, row.data, row.protocol, row.T if row.when else None, row.when, row.metric

    asked = set(map(kind, rows))
    return [
        row
        for other, methods in BESIDE.get(name, {}).items()
        for row in page_rows.read(out / f"{other}.csv")
        if row.method in methods and kind(row) in asked
    ]


def make(name: str, sweep: SweepConfig, wanted: Sequence[Cell], jobs: int, minutes: float | None) -> list[CellState]:
    """Make the cells, a thread for each: of small products, two side by side make more than one with two threads."""
    file, place = KEPT / f"{name}.yaml", KEPT / name
    source = file.read_text(encoding="utf-8")
    try:
        folder = SweepFolder.open(place).extended(wanted, source)
    except RunFolderError:
        manifest = Manifest(sweep.title, sweep.kind, tuple(wanted), 1, sweep.untouched, str(Path.cwd()), source)
        folder = SweepFolder.create(place, manifest)
    # Sweeps over the same records want the same values.
    values = place / VALUES
    if not values.exists():
        (KEPT / VALUES).mkdir(exist_ok=True)
        values.symlink_to((KEPT / VALUES).resolve(), target_is_directory=True)
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    told: set[str] = set()

    def watch(states: Sequence[CellState]) -> None:
        for state in states:
            if state.status in ("done", "failed") and state.cell.name not in told:
                told.add(state.cell.name)
                print(time.strftime("%H:%M"), state.status, state.cell.name, state.note, flush=True)
        if time.monotonic() > end:
            raise KeyboardInterrupt

    return drive(folder, LocalWorkers(jobs), watch)


def finished(name: str, cells: Iterable[Cell]) -> dict[str, list[Row]]:
    """The numbers of those cells that were made, to their end, on this machine."""
    found: dict[str, list[Row]] = {}
    for cell in cells:
        results = list(results_of_run(KEPT / name / CELLS / cell.name, cell.axes))
        if results and all(result.finished for result in results):
            # A run with two rows of a table gives two results.
            found[cell.name] = [row for result in results for row in page_rows.rows_of(result)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(path.stem for path in SWEEPS.glob("*.yaml")))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="stands for DATA in the file")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="stop after so many; the next time goes on from there")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of cells, with * (they begin with the method)")
    parser.add_argument("--anew", action="store_true", help="measure again what the CSV holds")
    options = parser.parse_args()
    sweep, every = cells(options.name, options.data)
    file = options.out / f"{options.name}.csv"
    kept: dict[str, list[Row]] = {}
    for row in [] if options.anew else page_rows.read(file):
        kept.setdefault(row.cell, []).append(row)
    missing = [cell for cell in every if cell.name not in kept]
    wanted = [cell for cell in missing if any(fnmatch(cell.name, only) for only in options.only)]
    failed = False
    if wanted:
        with suppress(KeyboardInterrupt):
            states = make(options.name, sweep, wanted, options.jobs, options.minutes)
            failed = any(state.status == "failed" for state in states)
    kept |= finished(options.name, missing)
    rows = [row for cell in every for row in kept.get(cell.name, [])]
    page_rows.write(file, rows)
    waiting = sum(cell.name not in kept and not cell.skipped for cell in every)
    shown = [*rows, *beside(options.name, rows, options.out)]
    text = "\n".join(page(options.name, shown, waiting, options.out)).rstrip() + "\n"
    (options.out / f"{options.name}.md").write_text(text, encoding="utf-8")
    # A cell that failed has said so; what was measured is on the page.
    sys.exit(failed)


if __name__ == "__main__":
    main()
