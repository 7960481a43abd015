"""``everedit summarize``: the papers' tables from run folders and sweeps."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from everedit.cli.console import friendly, show_json, show_table, show_text, terminal

if TYPE_CHECKING:
    from everedit.report.tables import Table


class Form(str, Enum):
    """How tables are written."""

    PAPER = "paper"
    MARKDOWN = "markdown"
    LATEX = "latex"
    CSV = "csv"
    JSON = "json"


class Moment(str, Enum):
    """When scores were taken."""

    IMMEDIATE = "immediate"
    RETAINED = "retained"
    UNCONTRADICTED = "uncontradicted"
    FIRST_100 = "first_100"
    FINAL = "final"


@friendly
def summarize(
    folders: list[Path] = typer.Argument(help="Run folders, sweep folders, or folders of such folders."),
    table: Form = typer.Option(Form.PAPER, help="For the terminal, a page, a paper or a program."),
    score: Moment = typer.Option(
        Moment.RETAINED,
        help="Right after each edit; all T edits with the model after T; without those that a later one contradicts; "
        "the first 100 alone; the first T edits with the last model.",
    ),
    protocol: list[str] = typer.Option([], help="Only these protocols; may be given several times."),
    intervals: bool = typer.Option(False, "--intervals", help="With 95% bootstrap intervals over edits (and seeds)."),
) -> None:
    """Show method by T by metric, one table for each model, data set and protocol, the unedited model first."""
    from everedit.errors import near_names
    from everedit.report.collect import collect
    from everedit.report.tables import latex, markdown, tables, tidy, tidy_csv

    results = collect(folders)
    known = list(dict.fromkeys(name for result in results for name in result.protocols))
    for name in protocol:
        if name not in known:
            raise near_names("protocol in these runs", name, known)
    found = tables(results, score.value, protocol)
    if table is Form.PAPER:
        for each in found:
            _show(each, intervals)
    elif table is Form.JSON:
        show_json(tidy(found))
    else:
        if table is Form.CSV:
            text = tidy_csv(found)
        else:
            text = (markdown if table is Form.MARKDOWN else latex)(found, interval=intervals)
        show_text(text)


def _show(table: Table, intervals: bool) -> None:
    """Show a table as papers' texts do, Rel/Gen/Loc in one cell; where that finds no room, with a row for each T."""
    width = len(table.metrics)
    packed = [
        (name, *("/".join(map(_short, cells[start : start + width])) for start in range(0, len(cells), width)))
        for name, cells in table.cells(2)
    ]
    if not intervals and _widest(packed) <= terminal.width:
        title = f"{table.title}: {'/'.join(table.heads())} {table.note}"
        show_table(title, ("method", *(f"T={mark}" for mark in table.marks)), packed)
        return
    rows = [
        (name, str(mark), *cells[place * width : (place + 1) * width])
        for name, cells in table.cells(2, interval=intervals)
        for place, mark in enumerate(table.marks)
    ]
    show_table(f"{table.title}: {table.note}", ("method", "T", *table.heads()), rows)


def _short(number: str) -> str:
    """Return a number as papers print it, without the zero that says nothing."""
    return number.replace("0.", ".", 1) if number.startswith("0.") else number


def _widest(rows: list[tuple[str, ...]]) -> int:
    """Return how wide a table of these rows is, with its rules."""
    return 1 + sum(3 + max(map(len, column)) for column in zip(*rows, strict=True))
