"""Figures of the report as inline SVG strings that follow the page's colours.

Only matplotlib's object interface is used: no pyplot and no change to its global settings. Text is drawn
as outlines, so a figure looks the same wherever the page is opened. Colours become CSS variables, which
lets the same figure serve the light and the dark page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Light-page values (after Okabe and Ito, darkened to 4.5:1 on white where they carry text). Each must
# differ from the others, since the finished SVG is recoloured by value.
PALETTE = {
    "blue": "#0067a0",
    "orange": "#b84e00",
    "green": "#00785a",
    "purple": "#98407f",
    "sky": "#56b4e9",
    "amber": "#e69f00",
    "grey": "#9a9a9c",
    "ink": "#24262b",
    "muted": "#5d6169",
    "grid": "#e3e4e8",
}
METRIC_STYLE = {
    "reliability": ("blue", "o"),
    "generalization": ("orange", "s"),
    "locality": ("green", "^"),
    "portability": ("purple", "D"),
}
_PHASE_COLOURS = {"keys": "sky", "target": "blue", "solve": "amber", "policy": "green", "score": "grey"}
_LINE_COLOURS = (("blue", "o"), ("orange", "s"), ("green", "^"), ("purple", "D"), ("ink", "v"))
_MOST_BARS = 120

Points = Sequence[tuple[int, float]]


def scores_figure(running: Mapping[str, Points], retained: Mapping[str, Points], describe: str) -> str:
    """Return the SVG of scores against the number of edits; an empty string if there are no scores.

    ``running`` is drawn as thin lines and ``retained`` as lines with markers. ``describe`` is the
    figure's text for readers who cannot see it.
    """
    if not any(running.values()) and not any(retained.values()):
        return ""
    figure, axes = _canvas(height=4.3, right=0.835)
    ends: list[tuple[float, str, str]] = []
    for metric, (colour, marker) in METRIC_STYLE.items():
        thin, marked = running.get(metric, ()), retained.get(metric, ())
        if thin:
            axes.plot(*_xy(thin), color=PALETTE[colour], linewidth=0.9, alpha=0.65)
        if marked:
            axes.plot(
                *_xy(marked),
                color=PALETTE[colour],
                linewidth=2.0,
                marker=marker,
                markersize=5.5,
                clip_on=False,
                zorder=3,
            )
        if thin or marked:
            # The name belongs to the line that reaches furthest right; retained wins a tie.
            last = max([*marked[-1:], *thin[-1:]], key=lambda point: point[0])
            ends.append((last[1], metric, colour))
    _edit_axis(axes, [*running.values(), *retained.values()])
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_ylabel("score", color=PALETTE["muted"], fontsize=9)
    _end_labels(axes, ends, low=0.0, high=1.0)
    return _svg(figure, "fig-scores", "Scores against number of edits", describe)


def seconds_figure(numbers: Sequence[int], seconds: Mapping[str, Sequence[float]], describe: str) -> str:
    """Return the SVG of seconds per edit stacked by phase; an empty string if nothing was timed.

    Long runs are drawn as means over groups of consecutive edits.
    """
    if not numbers or not any(any(values) for values in seconds.values()):
        return ""
    figure, axes = _canvas(height=3.4, right=0.97)
    groups = _groups(len(numbers))
    edges = [numbers[start] - 0.5 for start, _ in groups] + [numbers[-1] + 0.5]
    floor = [0.0] * len(groups)
    for phase, values in seconds.items():
        means = [sum(values[start:stop]) / (stop - start) for start, stop in groups]
        top = [low + value for low, value in zip(floor, means, strict=True)]
        colour = PALETTE[_PHASE_COLOURS.get(phase, "purple")]
        axes.stairs(top, edges, baseline=floor, fill=True, color=colour, linewidth=0, label=phase)
        floor = top
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(floor) * 1.06)
    _whole_numbers(axes)
    axes.set_xlabel("edit", color=PALETTE["muted"], fontsize=9)
    axes.set_ylabel("seconds per edit", color=PALETTE["muted"], fontsize=9)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.012, 1.0),
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=PALETTE["ink"],
        handlelength=1.0,
        columnspacing=1.4,
    )
    return _svg(figure, "fig-seconds", "Seconds per edit by phase", describe)


def norms_figure(ratios: Mapping[str, Points], describe: str) -> str:
    """Return the SVG of weight-norm ratios at checkpoints; an empty string if none were recorded.

    With more matrices than colours, those that moved furthest from 1 are named and the rest are grey.
    """
    if not ratios:
        return ""
    figure, axes = _canvas(height=3.4, right=0.76)
    named = set(most_changed(ratios))
    styles = iter(_LINE_COLOURS)
    ends: list[tuple[float, str, str]] = []
    for name, points in ratios.items():
        colour, marker = next(styles) if name in named else ("grey", "")
        width = 1.8 if name in named else 0.8
        axes.plot(
            *_xy(points),
            color=PALETTE[colour],
            linewidth=width,
            marker=marker,
            markersize=5,
            clip_on=False,
            zorder=3,
        )
        if name in named:
            ends.append((points[-1][1], short_name(name), colour))
    axes.axhline(1.0, color=PALETTE["muted"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    values = [1.0, *(value for points in ratios.values() for _, value in points)]
    low, high = min(values), max(values)
    # A span of at least 2% keeps rounding noise of an almost unchanged matrix from looking like a change.
    margin = max(high - low, 0.02) * 0.08
    low, high = low - margin, max(high, low + 0.02) + margin
    axes.set_ylim(low, high)
    axes.ticklabel_format(axis="y", useOffset=False)
    _edit_axis(axes, list(ratios.values()))
    axes.set_ylabel("norm / norm before editing", color=PALETTE["muted"], fontsize=9)
    _end_labels(axes, ends, low=low, high=high)
    return _svg(figure, "fig-norms", "Norm of each edited matrix relative to the unedited model", describe)


def most_changed(ratios: Mapping[str, Points]) -> list[str]:
    """Return the names of the matrices furthest from 1 at their last checkpoint, as many as are named."""
    distance = {name: abs(points[-1][1] - 1) for name, points in ratios.items()}
    return sorted(distance, key=lambda name: -distance[name])[: len(_LINE_COLOURS)]


def short_name(matrix: str) -> str:
    """Return e.g. 'layer 9 mlp.down_proj' for 'model.layers.9.mlp.down_proj.weight'."""
    match = re.fullmatch(r".*?\.(\d+)\.(.+?)(?:\.weight)?", matrix)
    return f"layer {match[1]} {match[2]}" if match else matrix


def _canvas(height: float, right: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, height))
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    figure.subplots_adjust(left=0.075, right=right, top=1 - 0.34 / height, bottom=0.5 / height)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color=PALETTE["grid"], linewidth=0.8, linestyle="-")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALETTE["muted"])
    axes.tick_params(colors=PALETTE["muted"], labelcolor=PALETTE["muted"], labelsize=9, length=3, which="both")
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _xy(points: Points) -> tuple[list[int], list[float]]:
    return [n for n, _ in points], [value for _, value in points]


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _edit_axis(axes: Axes, series: Sequence[Points]) -> None:
    """Label the axis of edit numbers; long runs get a logarithmic one, as checkpoints grow that way."""
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    numbers = [n for points in series for n, _ in points]
    first, last = min(numbers), max(numbers)
    if last >= 100 * first:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(first * 0.93, last * 1.03)
    else:
        _whole_numbers(axes)
        pad = max(0.015 * (last - first), 0.5 if first == last else 0.0)
        axes.set_xlim(first - pad, last + pad)
    label = "number of edits" + (" (logarithmic)" if last >= 100 * first else "")
    axes.set_xlabel(label, color=PALETTE["muted"], fontsize=9)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]], low: float, high: float) -> None:
    """Write each line's name beside its end, moved apart where names would overlap."""
    gap = (high - low) * 0.068
    placed: list[float] = []
    ordered = sorted(ends)
    for value, _, _ in ordered:
        placed.append(max(value, placed[-1] + gap) if placed else value)
    ceiling = high
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    for y, (_, name, colour) in zip(placed, ordered, strict=True):
        axes.text(
            1.012,
            y,
            name,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=PALETTE[colour],
            parse_math=False,
        )


def _groups(count: int) -> list[tuple[int, int]]:
    size = -(-count // _MOST_BARS)
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def _svg(figure: Figure, prefix: str, title: str, describe: str) -> str:
    """Return the figure as an inline SVG element with a title, a description and the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    view_box = re.search(r'viewBox="([^"]*)"', text)
    # Metadata, comments and namespaces have no use inside a page, and would add outside addresses.
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"\n\s*", "\n", body).replace("xlink:href=", "href=")
    # matplotlib's names are random or shared between figures; a page needs them unique, a rerun stable.
    for i, name in enumerate(dict.fromkeys(re.findall(r'id="([^"]*)"', body))):
        pattern = rf'(id="|href="#|url\(#){re.escape(name)}(?=["\)])'
        body = re.sub(pattern, rf"\g<1>{prefix}-{i}", body)
    for name, value in PALETTE.items():
        body = body.replace(value, f"var(--{name}, {value})")
    return (
        f'<svg viewBox="{view_box[1] if view_box else "0 0 662 300"}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{html.escape(title)}</title>'
        f'<desc id="{prefix}-desc">{html.escape(describe)}</desc>{body.strip()}'
    )
