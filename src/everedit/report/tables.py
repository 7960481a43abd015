"""The papers' tables: a line for each method under a policy, a group of columns for each number of edits T."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from everedit.report.collect import Result, When, named
from everedit.report.results import mean
from everedit.uncertainty import bootstrap_interval

__all__ = ["AVERAGE", "Entry", "Table", "latex", "markdown", "tables", "tidy", "tidy_csv"]

AVERAGE = "average"
"""The mean of reliability, generalization and locality, as WISE and SimIE print it."""

_AVERAGED = ("reliability", "generalization", "locality")
_SHORT = {"reliability": "Rel", "generalization": "Gen", "locality": "Loc", "portability": "Port", AVERAGE: "Avg"}
_WHEN = {
    "immediate": "right after each edit, mean of the first T",
    "retained": "of all T edits, with the model after T edits",
    "final": "of the first T edits, with the last model",
}
_SINGLE = "single edits, each taken back before the next"
UNEDITED = "unedited"


@dataclass(frozen=True)
class Entry:
    """A number of a table: the mean over ``seeds`` runs, the standard deviation between them if they are several, and
    the bootstrap interval where every edit's score was kept.
    """

    value: float
    seeds: int = 1
    deviation: float | None = None
    low: float | None = None
    high: float | None = None

    def text(self, digits: int, *, interval: bool = False) -> str:
        """Return the number as it is printed."""
        said = f"{self.value:.{digits}f}"
        if interval and self.low is not None and self.high is not None:
            return f"{said} [{self.low:.{digits}f}, {self.high:.{digits}f}]"
        return said if self.deviation is None else f"{said} ± {self.deviation:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """The scores of one model on one data set under one protocol; nothing else is ever mixed in."""

    model: str
    data: str
    protocol: str
    when: When
    single: bool
    marks: list[int]
    metrics: list[str]
    rows: list[tuple[str, dict[tuple[int, str], Entry]]]

    @property
    def title(self) -> str:
        """What the table is about."""
        return f"{Path(self.model).name}, {self.data}, {self.protocol}"

    @property
    def note(self) -> str:
        """What its numbers are."""
        how = _SINGLE if self.single else _WHEN[self.when]
        several = any(entry.seeds > 1 for _, entries in self.rows for entry in entries.values())
        return f"{how}; mean ± standard deviation over seeds" if several else how

    def columns(self) -> list[tuple[int, str]]:
        """Return (T, metric) of each column."""
        return [(mark, metric) for mark in self.marks for metric in self.metrics]

    def heads(self) -> list[str]:
        """Return the short names of the metrics, in order."""
        return [_SHORT.get(metric, metric) for metric in self.metrics]

    def cells(self, digits: int, *, interval: bool = False, nothing: str = "–") -> Iterator[tuple[str, list[str]]]:
        """Yield each row's name and its printed numbers."""
        for name, entries in self.rows:
            found = (entries.get(column) for column in self.columns())
            yield name, [entry.text(digits, interval=interval) if entry else nothing for entry in found]


def tables(results: Sequence[Result], when: When = "retained", protocols: Sequence[str] = ()) -> list[Table]:
    """Return one table for each model, data set and protocol (only ``protocols``, if any are given)."""
    groups: dict[tuple[str, str, str, bool], list[Result]] = {}
    for result in results:
        for protocol in result.protocols:
            if not protocols or protocol in protocols:
                key = result.axes["model"], result.axes["data"], protocol, result.single
                groups.setdefault(key, []).append(result)
    return [_table(key, group, when) for key, group in groups.items()]


def _table(key: tuple[str, str, str, bool], group: list[Result], when: When) -> Table:
    model, data, protocol, single = key
    marks = sorted({mark for result in group for mark in result.marks})
    known = list(dict.fromkeys(metric for result in group for metric in result.metrics(protocol)))
    rows = [(UNEDITED, _entries(group, known, marks, lambda result, mark: result.unedited(protocol, mark)))]
    for name, runs in named(group).items():
        unfinished = "" if all(run.finished for run in runs) else " (unfinished)"

        def scores(result: Result, mark: int) -> dict[str, float | None]:
            return result.scores(protocol, mark, when)

        def each(result: Result, metric: str, mark: int) -> list[float | None]:
            return result.by_edit(protocol, metric, mark, when)

        rows.append((name + unfinished, _entries(runs, known, marks, scores, each)))
    found = {metric for _, entries in rows for _, metric in entries}
    metrics = [metric for metric in [*known, AVERAGE] if metric in found]
    if AVERAGE in metrics:
        # Where the papers have it: behind the three that it is the mean of.
        metrics.remove(AVERAGE)
        metrics.insert(metrics.index(_AVERAGED[-1]) + 1, AVERAGE)
    rows = [(name, entries) for name, entries in rows if entries or name != UNEDITED]
    return Table(model, data, protocol, when, single, marks, metrics, rows)


def _entries(
    runs: Sequence[Result],
    metrics: Sequence[str],
    marks: Sequence[int],
    scores: Callable[[Result, int], dict[str, float | None]],
    each: Callable[[Result, str, int], list[float | None]] | None = None,
) -> dict[tuple[int, str], Entry]:
    """Return the numbers of one row. The unedited model's, which has no ``each``, have no interval either."""
    found = {}
    for mark in marks:
        # A run that is shorter than T says nothing about T.
        there = [(run, scores(run, mark)) for run in runs if mark in run.marks]
        for metric in [*metrics, AVERAGE]:
            pairs = [(run, value) for run, block in there if (value := _value(block, metric)) is not None]
            if not pairs:
                continue
            values = [value for _, value in pairs]
            interval: tuple[float | None, float | None] = None, None
            deviation = None
            if each is not None:
                samples = [_known(each(run, metric, mark)) for run, _ in pairs] if metric != AVERAGE else [[]]
                # One edit says nothing about how another would have fared.
                interval = bootstrap_interval(samples) if min(map(len, samples)) > 1 else interval
                deviation = stdev(values) if len(values) > 1 else None
            seeds = len(values) if each is not None else 1
            found[mark, metric] = Entry(sum(values) / len(values), seeds, deviation, *interval)
    return found


def _value(scores: dict[str, float | None], metric: str) -> float | None:
    if metric != AVERAGE:
        return scores.get(metric)
    parts = [scores.get(name) for name in _AVERAGED]
    return mean(parts) if None not in parts else None


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def markdown(found: Sequence[Table], *, interval: bool = False) -> str:
    """Return the tables in Markdown, each under its title."""
    parts = []
    for table in found:
        heads = [f"T={mark} {head}" for mark in table.marks for head in table.heads()]
        lines = [f"**{table.title}**: {table.note}", "", _piped(["method", *heads])]
        lines.append(_piped(["---", *["---:"] * len(heads)]))
        lines += [_piped([name, *cells]) for name, cells in table.cells(3, interval=interval)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _piped(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def latex(found: Sequence[Table], *, interval: bool = False) -> str:
    """Return the tables in LaTeX, for the package booktabs."""
    parts = []
    for table in found:
        width = len(table.metrics)
        groups = [rf"\multicolumn{{{width}}}{{c}}{{$T={mark}$}}" for mark in table.marks]
        rules = [rf"\cmidrule(lr){{{2 + i * width}-{1 + (i + 1) * width}}}" for i in range(len(table.marks))]
        heads = [_escaped(head) for _ in table.marks for head in table.heads()]
        lines = [
            r"\begin{table}",
            rf"\caption{{{_escaped(table.title)}: {_escaped(table.note)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(heads)}}}",
            r"\toprule",
            _row(["", *groups]),
            " ".join(rules),
            _row(["method", *heads]),
            r"\midrule",
            *(_row(map(_escaped, [name, *cells])) for name, cells in table.cells(3, interval=interval, nothing="--")),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells).lstrip() + r" \\"


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def tidy(found: Sequence[Table]) -> list[dict[str, Any]]:
    """Return one row for each number, for programs: every name in full, nothing rounded."""
    return [
        {
            "model": table.model,
            "data": table.data,
            "protocol": table.protocol,
            "single": table.single,
            "method": name,
            "T": mark,
            "when": table.when,
            "metric": metric,
            "value": entry.value,
            "low": entry.low,
            "high": entry.high,
            "seeds": entry.seeds,
            "deviation": entry.deviation,
        }
        for table in found
        for name, entries in table.rows
        for (mark, metric), entry in entries.items()
    ]


def tidy_csv(found: Sequence[Table]) -> str:
    """Return :func:`tidy`'s rows as CSV."""
    rows = tidy(found)
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys() if rows else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
