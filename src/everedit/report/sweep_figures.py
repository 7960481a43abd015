"""Figures over many runs: scores against T with bands, what is retained of the first edits, growth, time and memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from everedit.cache import atomic_write
from everedit.report.collect import named
from everedit.report.drawing import PALETTE, blank, edit_axis, split, standing_alone, styled
from everedit.report.results import mean
from everedit.report.run_result import FIRST, Result, When
from everedit.report.wording import printed
from everedit.uncertainty import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Drawn", "Line", "Panel", "draw_lines", "figures", "save", "save_figures"]

_STYLES = [
    (colour, marker, dashes)
    for dashes, marker in (("-", "o"), ("--", "s"), (":", "^"))
    for colour in ("blue", "orange", "green", "purple", "amber", "ink", "sky", "grey")
]
_MOST_LINES = 8
_WIDTH = 9.2
# A line that grows so many times would leave nothing to see of the others.
_FAR = 100
_GROWTHS = {"norm_ratio": "norm", "singular_value_ratio": "largest singular value"}


@dataclass(frozen=True)
class Line:
    """A line of a panel: (T, value), and the interval (T, low, high) where it is known."""

    name: str
    points: list[tuple[int, float]]
    band: list[tuple[int, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Panel:
    """Lines over one axis of T, and the unedited model's value where it is a line of its own."""

    title: str
    lines: list[Line]
    unedited: float | None = None


@dataclass(frozen=True)
class Drawn:
    """A finished figure. ``slug`` is the name of its file, ``describe`` its text for those who cannot see it."""

    slug: str
    heading: str
    caption: str
    describe: str
    figure: Figure


def figures(results: Sequence[Result], when: When = "retained", protocols: Sequence[str] = ()) -> list[Drawn]:
    """Return all figures that the results have numbers for, by model and data set."""
    places: dict[tuple[str, str, bool], list[Result]] = {}
    for result in results:
        places.setdefault((result.axes["model"], result.axes["data"], result.single), []).append(result)
    found: list[Drawn] = []
    for (model, data, single), group in places.items():
        place = f"{Path(model).name}, {data}{', single edits' if single else ''}"
        names = list(dict.fromkeys(name for result in group for name in result.protocols))
        chosen = [name for name in names if not protocols or name in protocols]
        tasks = [name for name in chosen if any(name in result.abilities for result in group)]
        edited = [name for name in chosen if name not in tasks]
        for protocol in edited:
            found += _curves([result for result in group if protocol in result.protocols], protocol, when, place)
        found += [*_retention(group, edited, place), *_abilities(group, tasks, place)]
        found += [*_growth(group, place), *_costs(group, place)]
    return found


def save_figures(
    results: Sequence[Result], out: Path, when: When = "retained", protocols: Sequence[str] = ()
) -> list[Path]:
    """Write every figure as an SVG file of its own into ``out`` and return the files.

    Raises :class:`everedit.errors.CacheError` if one cannot be written.
    """
    return [save(drawn, out) for drawn in figures(results, when, protocols)]


def save(drawn: Drawn, out: Path) -> Path:
    """Write a figure as an SVG file named by its slug into ``out`` and return the file.

    Raises :class:`everedit.errors.CacheError` if it cannot be written.
    """
    file = out / f"{drawn.slug}.svg"
    atomic_write(file, partial(Path.write_bytes, data=standing_alone(drawn.figure)))
    return file


def _curves(results: list[Result], protocol: str, when: When, place: str) -> list[Drawn]:
    """One figure with a panel for each metric; of many lines, one for each metric with a panel for each method."""

    def lines(metric: str, among: Sequence[Result]) -> list[Line]:
        def value(result: Result, mark: int) -> float | None:
            return result.scores(protocol, mark, when).get(metric)

        def each(result: Result, mark: int) -> list[float | None]:
            return result.by_edit(protocol, metric, mark, when)

        return _lines(among, value, each)

    metrics = results[0].metrics(protocol)
    about = f"{place}, under {protocol}: {when} scores after T edits; bands are 95% bootstrap intervals."
    if len(named(results)) <= _MOST_LINES:
        panels = [Panel(metric, lines(metric, results)) for metric in metrics]
        return draw_lines(panels, f"Scores, {place}, {protocol}", about, "score", bounded=True)
    found = []
    for metric in metrics:
        methods: dict[str, list[Result]] = {}
        for result in results:
            methods.setdefault(printed(result.axes["method"]), []).append(result)
        panels = [
            Panel(method, [replace(line, name=_variant(line.name, method)) for line in lines(metric, among)])
            for method, among in methods.items()
        ]
        found += draw_lines(panels, f"{metric.capitalize()}, {place}, {protocol}", about, metric, bounded=True)
    return found


def _variant(line: str, method: str) -> str:
    return line.removeprefix(method).removeprefix(" + ").strip() or "alone"


def _retention(results: list[Result], protocols: Sequence[str], place: str) -> list[Drawn]:
    """What is left, as the stream goes on, of the first edits: as many as 100, or as an earlier checkpoint has."""
    streams = [result for result in results if not result.single and len(result.marks) > 1]
    early = {mark for result in streams for mark in result.marks[:-1] if mark <= FIRST}
    if not early:
        return []
    first = max(early)

    def panel(protocol: str) -> Panel:
        having = [result for result in streams if protocol in result.protocols]
        # A protocol's first metric is the one to show in one figure.
        metric = having[0].metrics(protocol)[0] if having else ""

        def each(result: Result, mark: int) -> list[float | None]:
            found = result.by_edit(protocol, metric, mark, "retained") if mark >= first else []
            return found[:first]

        return Panel(f"{protocol}: {metric}", _lines(having, lambda result, mark: mean(each(result, mark)), each))

    which = f"first {first} edits" if first > 1 else "first edit"
    caption = f"{place}: the {which}, asked again as the stream goes on; with 95% bootstrap intervals."
    panels = [panel(protocol) for protocol in protocols]
    return draw_lines(panels, f"What is retained of the {which}, {place}", caption, "score", bounded=True)


def _abilities(results: list[Result], tasks: Sequence[str], place: str) -> list[Drawn]:
    """A panel for each task of general ability: its first figure, and that of the unedited model."""

    def panel(task: str) -> Panel:
        having = [result for result in results if task in result.abilities]
        metric = having[0].metrics(task)[0]
        lines = _lines(having, lambda result, mark: result.scores(task, mark, "retained").get(metric))
        return Panel(f"{task}: {metric}", lines, having[0].unedited(task, 0).get(metric))

    caption = f"{place}: general ability after T edits; the dashed line is the unedited model."
    return draw_lines([panel(task) for task in tasks], f"General ability, {place}", caption, "score", bounded=True)


def _growth(results: list[Result], place: str) -> list[Drawn]:
    def panel(kind: str) -> Panel:
        growing = [result for result in results if result.growth.get(kind)]
        return Panel(_GROWTHS[kind], _lines(growing, lambda result, mark: dict(result.growth[kind]).get(mark)))

    caption = f"{place}: norm and largest singular value of the edited matrix that grew most, by those before editing."
    panels = [panel(kind) for kind in _GROWTHS]
    return draw_lines(panels, f"Growth of the edited weights, {place}", caption, "ratio", bounded=False)


def _lines(
    results: Sequence[Result],
    value: Callable[[Result, int], float | None],
    each: Callable[[Result, int], list[float | None]] | None = None,
) -> list[Line]:
    """Return a line for each method and policy: means over seeds, with a band where every edit's score is known."""
    lines = []
    for name, runs in named(results).items():
        points, band = [], []
        for mark in sorted({mark for run in runs for mark in run.marks}):
            there = [run for run in runs if mark in run.marks]
            found = mean(value(run, mark) for run in there)
            if found is None:
                continue
            points.append((mark, found))
            samples = [[v for v in each(run, mark) if v is not None] for run in there] if each else []
            if samples and min(map(len, samples)) > 1:
                band.append((mark, *bootstrap_interval(samples)))
        if points:
            lines.append(Line(name, points, band))
    return lines


def draw_lines(panels: list[Panel], heading: str, caption: str, label: str, *, bounded: bool) -> list[Drawn]:
    """Return the figure of ``panels`` beside each other, in a list; an empty one if there is nothing to draw.

    ``label`` names the vertical axis, which ends at 0 and 1 if it is ``bounded`` and no value is larger.
    """
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return []
    last = [f"{panel.title}, {line.name}: {line.points[-1][1]:.3g}" for panel in panels for line in panel.lines]
    describe = f"At the last number of edits: {'; '.join(last)}."
    return [Drawn(slug(heading), heading, caption, describe, _panels(panels, label, bounded=bounded))]


def slug(text: str) -> str:
    """Return a text as the name of a file."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-").lower()


def _panels(panels: Sequence[Panel], label: str, *, bounded: bool) -> Figure:
    """Return a figure with a panel beside the other and one legend for all; a line has the same look in each."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    styles = {name: _STYLES[place % len(_STYLES)] for place, name in enumerate(names)}
    across = min(len(panels), 2 if len(panels) <= 4 else 4)
    down = -(-len(panels) // across)
    legend = 0.24 * -(-len(names) // 4) + 0.1
    height = (2.7 if across < 4 else 2.2) * down + legend
    figure = blank(_WIDTH, height)
    figure.subplots_adjust(
        left=0.62 / _WIDTH, right=1 - 0.15 / _WIDTH, top=1 - (legend + 0.32) / height, bottom=0.5 / height,
        wspace=0.16, hspace=0.42,
    )  # fmt: skip
    for place, panel in enumerate(panels):
        axes = styled(figure.add_subplot(down, across, place + 1))
        axes.set_title(panel.title, fontsize=10, color=PALETTE["ink"], loc="left")
        for line in panel.lines:
            _draw(axes, panel, line, styles[line.name])
        if panel.unedited is not None:
            axes.axhline(panel.unedited, color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        edit_axis(axes, [line.points for line in panel.lines])
        axes.ticklabel_format(axis="y", useOffset=False)
        values = [value for line in panel.lines for _, value in line.points]
        if bounded and max(values) <= 1:
            axes.set_ylim(-0.03, 1.03)
        elif not bounded and min(values) > 0 and max(values) > _FAR * min(values):
            axes.set_yscale("log")
        if place % across == 0:
            axes.set_ylabel(label, color=PALETTE["muted"], fontsize=9)
        if place + across < len(panels):
            axes.set_xlabel("")
    handles = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(
        [handles[name] for name in names], names, loc="upper left", ncols=4, frameon=False, fontsize=9,
        labelcolor=PALETTE["ink"], handlelength=1.8, columnspacing=1.4, bbox_to_anchor=(0.0, 1.0),
    )  # fmt: skip
    return figure


def _draw(axes: Axes, panel: Panel, line: Line, style: tuple[str, str, str]) -> None:
    colour, marker, dashes = style
    if len(line.band) > 1:
        marks, lows, highs = zip(*line.band, strict=True)
        band = axes.fill_between(marks, lows, highs, color=PALETTE[colour], alpha=0.14, linewidth=0)
        band.set_gid(f"band-{slug(panel.title)}-{slug(line.name)}")
    [drawn] = axes.plot(
        *split(line.points), color=PALETTE[colour], linewidth=1.8, linestyle=dashes, marker=marker, markersize=4.5,
        clip_on=False, zorder=3, label=line.name,
    )  # fmt: skip
    drawn.set_gid(f"series-{slug(panel.title)}-{slug(line.name)}")


def _costs(results: list[Result], place: str) -> list[Drawn]:
    lines = named(results)
    seconds = {name: mean(run.cost.seconds for run in runs) for name, runs in lines.items()}
    memory = {name: mean(run.cost.memory_mb for run in runs) for name, runs in lines.items()}
    titled = (("seconds an edit, without scoring", seconds), ("peak memory, MiB", memory))
    known = [name for name in lines if seconds[name] is not None and memory[name] is not None]
    bars = [(title, {name: found[name] or 0.0 for name in known}) for title, found in titled]
    if not known:
        return []
    heading = f"Time and memory, {place}"
    said = "; ".join(f"{name} {value:.3g} s" for name, value in bars[0][1].items())
    caption = f"{place}: what an edit took, scoring left out, and the most memory that the run's process held."
    return [Drawn(slug(heading), heading, caption, f"Seconds an edit: {said}.", _bars(bars))]


def _bars(bars: Sequence[tuple[str, dict[str, float]]]) -> Figure:
    names = list(bars[0][1])
    height = 0.26 * len(names) + 0.8
    figure = blank(_WIDTH, height)
    figure.subplots_adjust(left=0.22, right=0.97, top=1 - 0.32 / height, bottom=0.3 / height, wspace=0.12)
    for place, (title, found) in enumerate(bars):
        axes = styled(figure.add_subplot(1, len(bars), place + 1))
        axes.grid(visible=False)
        axes.set_title(title, fontsize=10, color=PALETTE["ink"], loc="left")
        rows = range(len(names))
        drawn = axes.barh(rows, list(found.values()), height=0.62, color=PALETTE["blue"])
        axes.bar_label(
            drawn, [_figure_of(value) for value in found.values()], fontsize=8.5, padding=3, color=PALETTE["ink"]
        )
        axes.set_yticks(rows, names if place == 0 else [""] * len(names))
        axes.invert_yaxis()
        axes.margins(x=0.18)
    return figure


def _figure_of(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
