"""Which layers carry an edit, and how the residual is shared among them."""

from __future__ import annotations

from collections.abc import Callable

from everedit.errors import ModelError

__all__ = ["SHARES", "at_depth", "check_layers"]

SHARES: dict[str, Callable[[int], float]] = {
    "equal": lambda left: 1.0 / left,  # MEMIT: an equal part of what is left, layer by layer
    "sqrt": lambda left: left**-0.5,  # PMET
}


def at_depth(fraction: float, n_layers: int) -> int:
    """Return the layer at a fraction of the model's depth."""
    return min(n_layers - 1, max(0, round(fraction * n_layers)))


def check_layers(layers: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """Return the layers in ascending order. Raises :class:`ModelError` if the model lacks one of them."""
    bad = [layer for layer in layers if not 0 <= layer < n_layers]
    if bad or not layers:
        raise ModelError(
            what=f"the model has no layer {bad[0]}" if bad else "no layer is given",
            fix=f"choose layers between 0 and {n_layers - 1}",
        )
    return tuple(sorted(set(layers)))
