"""The heat maps of a causal trace, from the numbers in its ``trace.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from everedit.errors import RunFolderError

__all__ = ["write_trace_figure"]

_TITLES = {"state": "one hidden state", "mlp": "MLP outputs", "attention": "attention outputs"}
_COLOURS = {"state": "Purples", "mlp": "Greens", "attention": "Reds"}


def write_trace_figure(folder: Path) -> Path:
    """Draw ``trace.json`` of a folder as ``trace.svg`` beside it and return the path.

    Raises :class:`RunFolderError` if there is no trace that can be read.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
        effects: dict[str, list[list[float]]] = found["effects"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            what=f"cannot read the trace: {error!r}", where=str(folder / "trace.json"), fix="run everedit trace again"
        ) from error
    first, last = found["subject"]
    words = [word.strip() + ("*" if first <= place < last else "") for place, word in enumerate(found["tokens"])]
    figure = Figure(figsize=(4.2 * len(effects), 0.9 + 0.24 * len(words)), layout="constrained")
    figure.patch.set_facecolor("white")
    width = found["settings"]["window"]
    for place, (kind, values) in zip(figure.subplots(1, len(effects), squeeze=False)[0], effects.items(), strict=True):
        image = place.imshow(values, aspect="auto", cmap=_COLOURS[kind], vmin=0.0, interpolation="nearest")
        place.set_yticks(range(len(words)), words, fontsize=8)
        window = "" if kind == "state" else f", {width} blocks"
        place.set(title=f"restoring {_TITLES[kind]}{window}", xlabel="layer")
        figure.colorbar(image, ax=place, label=f"p({found['answer'].strip()}) gained")
    out = folder / "trace.svg"
    FigureCanvasSVG(figure).print_svg(str(out), metadata={"Date": None})
    return out
