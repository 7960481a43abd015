"""Figures over many runs: scores against T with bands, what is retained of the first edits, growth, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from everedit.cache import atomic_write
from everedit.report.collect import named
from everedit.report.drawing import PALETTE, blank, standing_alone, styled
from everedit.report.line_figures import WIDTH, Drawn, Line, Panel, draw_lines, draw_scores, slug
from everedit.report.results import mean
from everedit.report.run_result import FIRST, Result, When
from everedit.report.wording import printed
from everedit.uncertainty import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures", "save", "save_figures"]

_GROWTHS = {"norm_ratio": "norm", "singular_value_ratio": "largest singular value"}


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
    def lines(metric: str) -> list[Line]:
        def value(result: Result, mark: int) -> float | None:
            return result.scores(protocol, mark, when).get(metric)

        def each(result: Result, mark: int) -> list[float | None]:
            return result.by_edit(protocol, metric, mark, when)

        return _lines(results, value, each)

    about = f"{place}, under {protocol}: {when} scores after T edits; bands are 95% bootstrap intervals."
    methods = {name: printed(runs[0].axes["method"]) for name, runs in named(results).items()}
    scores = {metric: lines(metric) for metric in results[0].metrics(protocol)}
    return draw_scores(scores, methods, f"{place}, {protocol}", about)


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
    figure = blank(WIDTH, height)
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
