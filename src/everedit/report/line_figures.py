"""Curves over the number of edits, in panels beside each other: what a figure over many runs is drawn with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from everedit.report.drawing import PALETTE, blank, edit_axis, split, styled
from everedit.report.tables import UNEDITED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["WIDTH", "Drawn", "Line", "Panel", "draw_lines", "draw_scores", "slug"]

WIDTH = 9.2
"""Inches across, of every figure over many runs."""
_STYLES = [
    (colour, marker, dashes)
    for dashes, marker in (("-", "o"), ("--", "s"), (":", "^"))
    for colour in ("blue", "orange", "green", "purple", "amber", "ink", "sky", "grey")
]
_MOST_LINES = 8
# A line that grows so many times would leave nothing to see of the others.
_FAR = 100


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


def draw_scores(
    scores: Mapping[str, Sequence[Line]], methods: Mapping[str, str], place: str, about: str
) -> list[Drawn]:
    """Return one figure with a panel for each metric; where methods have many lines, under policies or with settings,
    one for each metric with a panel for each method.

    ``methods`` maps a line's name to its method; the unedited model's stands in every panel.
    """
    edited = {name: method for name, method in methods.items() if name != UNEDITED}
    if len(edited) <= _MOST_LINES or len(set(edited.values())) == len(edited):
        panels = [Panel(metric, list(lines)) for metric, lines in scores.items()]
        return draw_lines(panels, f"Scores, {place}", about, "score", bounded=True)
    found = []
    for metric, lines in scores.items():
        unedited = [line for line in lines if line.name == UNEDITED]
        by_method: dict[str, list[Line]] = {}
        for line in lines:
            if line.name != UNEDITED:
                method = methods[line.name]
                by_method.setdefault(method, []).append(replace(line, name=_variant(line.name, method)))
        panels = [Panel(method, [*own, *unedited]) for method, own in by_method.items()]
        found += draw_lines(panels, f"{metric.capitalize()}, {place}", about, metric, bounded=True)
    return found


def _variant(line: str, method: str) -> str:
    return line.removeprefix(method).removeprefix(" + ").strip() or "alone"


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
    figure = blank(WIDTH, height)
    figure.subplots_adjust(
        left=0.62 / WIDTH, right=1 - 0.15 / WIDTH, top=1 - (legend + 0.32) / height, bottom=0.5 / height,
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
