"""The papers' tables: a line for each method under a policy, a group of columns for each number of edits T."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from everedit.report.collect import named
from everedit.report.results import mean
from everedit.report.run_result import FIRST, Result, When
from everedit.uncertainty import bootstrap_interval

__all__ = ["Entry", "Table", "latex", "markdown", "tables", "tidy", "tidy_csv"]

_SHORT = {
    "reliability": "Rel",
    "generalization": "Gen",
    "locality": "Loc",
    "portability": "Port",
    "average": "Avg",
    "efficacy": "Eff",
    "paraphrase": "Para",
    "specificity": "Spe",
    "perplexity": "PPL",
    "perplexity_median": "median PPL",
}
_WHEN = {
    "immediate": "right after each edit, mean of the first T",
    "retained": "of all T edits, with the model after T edits",
    "uncontradicted": "of the T edits without those that a later one contradicts, with the model after T edits",
    "first_100": "of the first 100 edits, with the model after T edits",
    "final": "of the first T edits, with the last model",
}
_ABILITY = "general ability, with the model after T edits"
_SINGLE = "single edits, each taken back before the next"
UNEDITED = "unedited"
_LARGE = 1e6


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
        said = _number(self.value, digits)
        if interval and self.low is not None and self.high is not None:
            return f"{said} [{_number(self.low, digits)}, {_number(self.high, digits)}]"
        return said if self.deviation is None else f"{said} ± {_number(self.deviation, digits)}"


def _number(value: float, digits: int) -> str:
    # Of the perplexity of a broken model the power of ten is what can be read.
    return f"{value:.{digits}f}" if abs(value) < _LARGE else f"{value:.1e}"


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
    explanation: str = ""
    ability: bool = False

    @property
    def title(self) -> str:
        """What the table is about."""
        return f"{Path(self.model).name}, {self.data}, {self.protocol}"

    @property
    def note(self) -> str:
        """What its numbers are."""
        how = _ABILITY if self.ability else _SINGLE if self.single else _WHEN[self.when]
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
    rows = [(UNEDITED, _unedited(group, protocol, marks, when))]
    for name, runs in named(group).items():
        unfinished = "" if all(run.finished for run in runs) else " (unfinished)"
        entries: dict[tuple[int, str], Entry] = {}
        for mark, metric in ((mark, metric) for mark in marks for metric in known):
            # A run that is shorter than T says nothing about T.
            entry = _entry([run for run in runs if mark in run.marks], protocol, metric, mark, when)
            if entry is not None:
                entries[mark, metric] = entry
        rows.append((name + unfinished, entries))
    found = {metric for _, entries in rows for _, metric in entries}
    metrics = [metric for metric in known if metric in found]
    rows = [(name, entries) for name, entries in rows if entries or name != UNEDITED]
    return Table(
        model,
        data,
        protocol,
        when,
        single,
        marks,
        metrics,
        rows,
        group[0].explanation(protocol),
        protocol in group[0].abilities,
    )


def _unedited(group: list[Result], protocol: str, marks: list[int], when: When) -> dict[tuple[int, str], Entry]:
    """Return the unedited model's figures: means over the runs, which may have set aside different records."""
    found = {}
    for mark in marks:
        asked = min(mark, FIRST) if when == "first_100" else mark
        blocks = [run.unedited(protocol, asked) for run in group if mark in run.marks]
        for metric in dict.fromkeys(metric for block in blocks for metric in block):
            value = mean(block.get(metric) for block in blocks)
            if value is not None:
                found[mark, metric] = Entry(value)
    return found


def _entry(runs: list[Result], protocol: str, metric: str, mark: int, when: When) -> Entry | None:
    """Return one number: the mean over the runs, which differ in nothing but the seed."""
    pairs = [(run, value) for run in runs if (value := run.scores(protocol, mark, when).get(metric)) is not None]
    if not pairs:
        return None
    values = [value for _, value in pairs]
    found = _interval([run for run, _ in pairs], protocol, metric, mark, when)
    deviation = stdev(values) if len(values) > 1 else None
    return Entry(sum(values) / len(values), len(values), deviation, *(found or (None, None)))


def _interval(runs: list[Result], protocol: str, metric: str, mark: int, when: When) -> tuple[float, float] | None:
    of_edits = protocol not in runs[0].abilities
    if mark == 1 and of_edits:
        # One edit says nothing about how another would have fared.
        return None
    if len(runs) == 1 and (when == "retained" or not of_edits):
        kept = runs[0].interval(protocol, metric, mark)
        if kept is not None:
            return kept
    samples = [[v for v in run.by_edit(protocol, metric, mark, when) if v is not None] for run in runs]
    return bootstrap_interval(samples) if min(map(len, samples)) > 1 else None


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
