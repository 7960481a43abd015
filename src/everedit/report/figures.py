"""Figures of a run's report: scores, seconds and norms against the number of edits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from everedit.report.drawing import PALETTE, Points, canvas, edit_axis, end_labels, inline_svg, split, whole_numbers

METRIC_STYLE = {
    "reliability": ("blue", "o"),
    "generalization": ("orange", "s"),
    "locality": ("green", "^"),
    "portability": ("purple", "D"),
}
_PHASE_COLOURS = {"keys": "sky", "target": "blue", "solve": "amber", "policy": "green", "score": "grey"}
_LINE_COLOURS = (("blue", "o"), ("orange", "s"), ("green", "^"), ("purple", "D"), ("ink", "v"))
_MOST_BARS = 120


def scores_figure(running: Mapping[str, Points], retained: Mapping[str, Points], describe: str) -> str:
    """Return the SVG of scores against the number of edits; an empty string if there are no scores.

    ``running`` is drawn as thin lines and ``retained`` as lines with markers. ``describe`` is the
    figure's text for readers who cannot see it.
    """
    if not any(running.values()) and not any(retained.values()):
        return ""
    figure, axes = canvas(height=4.3, right=0.835)
    ends: list[tuple[float, str, str]] = []
    for metric, (colour, marker) in METRIC_STYLE.items():
        thin, marked = running.get(metric, ()), retained.get(metric, ())
        if thin:
            axes.plot(*split(thin), color=PALETTE[colour], linewidth=0.9, alpha=0.65)
        if marked:
            axes.plot(
                *split(marked),
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
    edit_axis(axes, [*running.values(), *retained.values()])
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_ylabel("score", color=PALETTE["muted"], fontsize=9)
    end_labels(axes, ends, low=0.0, high=1.0)
    return inline_svg(figure, "fig-scores", "Scores against number of edits", describe)


def seconds_figure(numbers: Sequence[int], seconds: Mapping[str, Sequence[float]], describe: str) -> str:
    """Return the SVG of seconds per edit stacked by phase; an empty string if nothing was timed.

    Long runs are drawn as means over groups of consecutive edits.
    """
    if not numbers or not any(any(values) for values in seconds.values()):
        return ""
    figure, axes = canvas(height=3.4, right=0.97)
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
    whole_numbers(axes)
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
    return inline_svg(figure, "fig-seconds", "Seconds per edit by phase", describe)


def norms_figure(ratios: Mapping[str, Points], describe: str) -> str:
    """Return the SVG of weight-norm ratios at checkpoints; an empty string if none were recorded.

    With more matrices than colours, those that moved furthest from 1 are named and the rest are grey.
    """
    if not ratios:
        return ""
    figure, axes = canvas(height=3.4, right=0.76)
    named = set(most_changed(ratios))
    styles = iter(_LINE_COLOURS)
    ends: list[tuple[float, str, str]] = []
    for name, points in ratios.items():
        colour, marker = next(styles) if name in named else ("grey", "")
        width = 1.8 if name in named else 0.8
        axes.plot(
            *split(points),
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
    edit_axis(axes, list(ratios.values()))
    axes.set_ylabel("norm / norm before editing", color=PALETTE["muted"], fontsize=9)
    end_labels(axes, ends, low=low, high=high)
    return inline_svg(figure, "fig-norms", "Norm of each edited matrix relative to the unedited model", describe)


def most_changed(ratios: Mapping[str, Points]) -> list[str]:
    """Return the names of the matrices furthest from 1 at their last checkpoint, as many as are named."""
    distance = {name: abs(points[-1][1] - 1) for name, points in ratios.items()}
    return sorted(distance, key=lambda name: -distance[name])[: len(_LINE_COLOURS)]


def short_name(matrix: str) -> str:
    """Return e.g. 'layer 9 mlp.down_proj' for 'model.layers.9.mlp.down_proj.weight'."""
    match = re.fullmatch(r".*?\.(\d+)\.(.+?)(?:\.weight)?", matrix)
    return f"layer {match[1]} {match[2]}" if match else matrix


def _groups(count: int) -> list[tuple[int, int]]:
    size = -(-count // _MOST_BARS)
    return [(start, min(start + size, count)) for start in range(0, count, size)]
