"""The survival curve of a living model's edits: what share is still held after so many further commits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from everedit.cache import atomic_write
from everedit.report.drawing import PALETTE

__all__ = ["write_survival_figure"]


def write_survival_figure(curve: Sequence[tuple[int, float]], out: Path) -> Path:
    """Draw a curve of (commits lived through, share alive) as an SVG file and return its path.

    Raises :class:`everedit.errors.CacheError` if it cannot be written.
    """
    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    figure.patch.set_facecolor("white")
    axes = figure.subplots()
    axes.step([length for length, _ in curve], [alive for _, alive in curve], where="post", color=PALETTE["blue"])
    axes.set(xlabel="commits since the edit", ylabel="share of edits still held", ylim=(0.0, 1.02))
    axes.grid(color=PALETTE["grid"], linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    atomic_write(out, lambda scratch: FigureCanvasSVG(figure).print_svg(str(scratch), metadata={"Date": None}))
    return out
