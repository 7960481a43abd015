"""How figures are drawn: axes, lines' names at their ends, and SVG that follows a page's colours or stands alone.

Only matplotlib's object interface is used: no pyplot and no change to its global settings. Text is drawn
as outlines, so a figure looks the same wherever the page is opened. Colours become CSS variables, which
lets the same figure serve the light and the dark page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
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

Points = Sequence[tuple[int, float]]


def canvas(height: float, right: float) -> tuple[Figure, Axes]:
    """Return an empty figure of a page's width, ``height`` inches high, with axes up to ``right`` of its width."""
    figure = blank(9.2, height)
    figure.subplots_adjust(left=0.075, right=right, top=1 - 0.34 / height, bottom=0.5 / height)
    return figure, styled(figure.add_subplot())


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    return figure


def styled(axes: Axes) -> Axes:
    """Give axes the look of all figures, and return them."""
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="y", color=PALETTE["grid"], linewidth=0.8, linestyle="-")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PALETTE["muted"])
    axes.tick_params(colors=PALETTE["muted"], labelcolor=PALETTE["muted"], labelsize=9, length=3, which="both")
    axes.tick_params(axis="y", length=0)
    return axes


def split(points: Points) -> tuple[list[int], list[float]]:
    """Return the numbers of edits and the values."""
    return [n for n, _ in points], [value for _, value in points]


def whole_numbers(axes: Axes) -> None:
    """Put the marks of the horizontal axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def edit_axis(axes: Axes, series: Sequence[Points]) -> None:
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
        whole_numbers(axes)
        pad = max(0.015 * (last - first), 0.5 if first == last else 0.0)
        axes.set_xlim(first - pad, last + pad)
    label = "number of edits" + (" (logarithmic)" if last >= 100 * first else "")
    axes.set_xlabel(label, color=PALETTE["muted"], fontsize=9)


def end_labels(axes: Axes, ends: Sequence[tuple[float, str, str]], low: float, high: float) -> None:
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


def inline_svg(figure: Figure, prefix: str, title: str, describe: str) -> str:
    """Return the figure as an inline SVG element with a title, a description and the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    view_box = re.search(r'viewBox="([^"]*)"', text)
    # Metadata, comments and namespaces have no use inside a page, and would add outside addresses.
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"\n\s*", "\n", body).replace("xlink:href=", "href=")
    body = _renamed(body, prefix, re.findall(r'id="([^"]*)"', body))
    for name, value in PALETTE.items():
        body = body.replace(value, f"var(--{name}, {value})")
    return (
        f'<svg viewBox="{view_box[1] if view_box else "0 0 662 300"}" role="img" '
        f'aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{html.escape(title)}</title>'
        f'<desc id="{prefix}-desc">{html.escape(describe)}</desc>{body.strip()}'
    )


def standing_alone(figure: Figure) -> bytes:
    """Return the figure as an SVG file of its own, on white; lines and bands keep the names they were given."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    text = buffer.getvalue()
    return _renamed(text, "part", re.findall(r'id="((?!series-|band-)[^"]*)"', text)).encode()


def _renamed(text: str, prefix: str, names: Sequence[str]) -> str:
    """Give ids of an SVG names that count up: matplotlib's are random, or shared between the figures of a page."""
    for i, name in enumerate(dict.fromkeys(names)):
        pattern = rf'(id="|href="#|url\(#){re.escape(name)}(?=["\)])'
        text = re.sub(pattern, rf"\g<1>{prefix}-{i}", text)
    return text
