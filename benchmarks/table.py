"""The table that ``make bench`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One measurement: the plain version, ours, their ratio and the least ratio that we promise."""

    what: str
    plain: float
    ours: float
    unit: str
    ratio: float
    bar: float
    note: str


def show(rows: Iterable[Row]) -> None:
    table = Table(title="Ratios inside one run", title_justify="left")
    for column in ("what", "plain", "ours", "unit", "ratio", "bar", "", "how"):
        table.add_column(column)
    for row in rows:
        verdict = "[green]holds[/]" if row.ratio >= row.bar else "[red]missed[/]"
        figures = (f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in (row.plain, row.ours))
        table.add_row(row.what, *figures, row.unit, f"{row.ratio:.2f}", f"{row.bar:g}", verdict, row.note)
    Console().print(table)


def said(row: Row) -> Row:
    """Return the row, having written it to standard error."""
    Console(stderr=True).print(f"{row.what}: {row.plain:.4g} against {row.ours:.4g} {row.unit}, ratio {row.ratio:.2f}")
    return row
