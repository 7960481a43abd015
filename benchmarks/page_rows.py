"""The numbers of a page that is a sweep, in a CSV file beside it: what stands there need not be measured again.

A row is a number. ``cell`` is the sweep's name of the run that it comes from, which holds a digest of every setting;
``when`` is as in the tables of ``everedit summarize``, or ``single`` for edits that were taken back one by one, or
``ability`` for general ability. What a run cost has the protocol ``cost``, and how its weights grew ``growth``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import stdev
from typing import NamedTuple, get_args

from everedit.cache import atomic_write
from everedit.report.line_figures import Drawn, Line, draw_scores
from everedit.report.results import mean
from everedit.report.run_result import FIRST, Result, When
from everedit.report.tables import UNEDITED, Entry, Table, tables, tidy

COST, GROWTH = "cost", "growth"
_GROWTHS = {"norm_ratio": "norm", "singular_value_ratio": "top σ", "flashes": "flashes", "buildup": "buildup"}
SINGLE, ABILITY = "single", "ability"


class Row(NamedTuple):
    """One number, with its bootstrap interval where it has one."""

    cell: str
    model: str
    data: str
    protocol: str
    method: str
    T: int
    when: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


def rows_of(result: Result) -> list[Row]:
    """Return all numbers of a finished run."""
    cell, axes = result.folder.name, result.axes
    scored = [name for name in result.protocols if name not in result.abilities]
    found = _rows(result, "retained", SINGLE if result.single else "retained", scored)
    if not result.single:
        found += _rows(result, "immediate", "immediate", scored)
        found += _rows(result, "uncontradicted", "uncontradicted", scored)
        # Up to a hundred edits the first hundred are all of them.
        found += [row for row in _rows(result, "first_100", "first_100", scored) if row.T > FIRST]
    if result.abilities:
        found += _rows(result, "retained", ABILITY, result.abilities)
    last = result.marks[-1]

    def add(protocol: str, mark: int, metric: str, value: float | None) -> None:
        if value is not None:
            found.append(Row(cell, axes["model"], axes["data"], protocol, result.line, mark, "", metric, value))

    add(COST, last, "seconds", result.cost.seconds)
    add(COST, last, "memory_mb", result.cost.memory_mb)
    for metric, points in result.growth.items():
        for mark, value in points:
            add(GROWTH, mark, metric, value)
    return found


def _rows(result: Result, when: When, called: str, protocols: Sequence[str]) -> list[Row]:
    items = sorted(tidy(tables([result], when, protocols)), key=itemgetter("T"))
    known = [{key: item[key] for key in Row._fields if key in item} for item in items]
    return [Row(**{**fields, "cell": result.folder.name, "when": called}) for fields in known]


def read(file: Path) -> list[Row]:
    """Return the rows of a file; none where there is no file."""
    if not file.exists():
        return []

    def number(text: str) -> float | None:
        return float(text) if text else None

    with file.open(encoding="utf-8", newline="") as lines:
        return [
            Row(
                *(row[name] for name in Row._fields[:5]),
                int(row["T"]),
                row["when"],
                row["metric"],
                float(row["value"]),
                number(row["low"]),
                number(row["high"]),
            )
            for row in csv.DictReader(lines)
        ]


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write the rows, numbers to six digits."""

    def text(value: object) -> object:
        return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value

    def put(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows([text(value) for value in row] for row in rows)

    atomic_write(file, put)


def tables_of(rows: Sequence[Row], when: str) -> list[Table]:
    """Return a table for each model, data set and protocol; runs of one name are averaged, as over seeds."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.when == when:
            groups.setdefault((row.model, row.data, row.protocol), []).append(row)
    # Where nothing but the unedited model has scores, none were asked for.
    asked = {place: group for place, group in groups.items() if any(row.method != UNEDITED for row in group)}
    return [_table(place, group, when) for place, group in asked.items()]


def _table(place: tuple[str, str, str], group: list[Row], when: str) -> Table:
    lines: dict[str, dict[tuple[int, str], Entry]] = {UNEDITED: {}}
    for name, points in _points(group).items():
        lines[name] = {point: _entry(found, name) for point, found in points.items()}
    marks = sorted({row.T for row in group})
    metrics = list(dict.fromkeys(row.metric for row in group))
    rows = [(name, entries) for name, entries in lines.items() if entries]
    asked: When = when if when in get_args(When) else "retained"  # type: ignore[assignment]
    return Table(*place, asked, when == SINGLE, marks, metrics, rows, ability=when == ABILITY)


def _entry(found: list[Row], name: str) -> Entry:
    values = [row.value for row in found]
    # The unedited model is the same in every run: its runs differ in the records that they set aside, not by chance.
    value = sum(values) / len(values)
    if name == UNEDITED:
        return Entry(value)
    if len(values) > 1:
        return Entry(value, len(values), stdev(values))
    return Entry(value, low=found[0].low, high=found[0].high)


def _points(group: Sequence[Row]) -> dict[str, dict[tuple[int, str], list[Row]]]:
    """Return the rows of each line of a table or a figure by T and metric."""
    found: dict[str, dict[tuple[int, str], list[Row]]] = {}
    for row in group:
        found.setdefault(row.method, {}).setdefault((row.T, row.metric), []).append(row)
    return found


def curves_of(rows: Sequence[Row]) -> list[Drawn]:
    """Return figures for each model, data set and protocol: a panel for each metric, or for each of many methods."""
    found = []
    for table in [*tables_of(rows, "retained"), *tables_of(rows, ABILITY)]:
        scores = {metric: _lines(table, metric) for metric in table.metrics}
        methods = {name: name.split(" + ")[0] for name, _ in table.rows}
        about = f"{table.title}: {table.note}; bands are 95% bootstrap intervals."
        found += draw_scores(scores, methods, table.title, about)
    return found


def _lines(table: Table, metric: str) -> list[Line]:
    lines = []
    for name, entries in table.rows:
        here = [(mark, entry) for (mark, of), entry in sorted(entries.items()) if of == metric]
        points = [(mark, entry.value) for mark, entry in here]
        band = [(mark, e.low, e.high) for mark, e in here if e.low is not None and e.high is not None]
        lines.append(Line(name, points, band))
    return lines


def growth_of(rows: Sequence[Row]) -> list[str]:
    """Return the lines of tables of how the edited weights grew, one for each model and data set."""
    grown = [row for row in rows if row.protocol == GROWTH]
    lines: list[str] = []
    for place, group in groupby(sorted(grown, key=_place), _place):
        found = {(row.method, row.T, row.metric): row for row in group}
        columns = sorted(
            {(mark, metric) for _, mark, metric in found}, key=lambda at: (at[0], list(_GROWTHS).index(at[1]))
        )
        heads = " | ".join(f"T={mark} {_GROWTHS[metric]}" for mark, metric in columns)
        lines += ["", f"**{Path(place[0]).name}, {place[1]}**", "", f"| method | {heads} |"]
        lines.append(f"| --- |{' ---: |' * len(columns)}")
        for name in dict.fromkeys(method for method, _, _ in found):
            cells = [found.get((name, *column)) for column in columns]
            lines.append(f"| {name} | {' | '.join(Entry(cell.value).text(2) if cell else '–' for cell in cells)} |")
    return lines


def _place(row: Row) -> tuple[str, str]:
    return row.model, row.data


def costs_of(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table of what an edit took on each data set, scoring left out, and of peak memory."""
    spent = [row for row in rows if row.protocol == COST]
    places = list(dict.fromkeys((row.model, row.data) for row in spent))
    heads = [f"{Path(model).name}, {data}" for model, data in places]
    lines = [f"| method | {' | '.join(f'{head}: s/edit | MiB' for head in heads)} |"]
    lines.append(f"| --- |{' ---: | ---: |' * len(places)}")
    for name in dict.fromkeys(row.method for row in spent):
        cells = []
        for place in places:
            for metric, digits in (("seconds", 2), ("memory_mb", 0)):
                wanted = (*place, name, metric)
                of = [row.value for row in spent if (row.model, row.data, row.method, row.metric) == wanted]
                cells.append(f"{mean(of):,.{digits}f}" if of else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
