"""Low-rank factors of a change: its singular value decomposition, cut at a rank or where only rounding is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.patch import Delta, LowRank

__all__ = ["Factors", "factorised", "rounding"]


@dataclass(frozen=True)
class Factors:
    """``left @ right.T`` (d_out, r) and (d_in, r), both with the square roots of the singular values, float64.

    ``relative_error`` is the Frobenius norm of what was left out over that of the whole change; ``rank`` how many
    singular values stand above the rounding, before any cut.
    """

    left: Tensor
    right: Tensor
    relative_error: float
    rank: int

    @property
    def width(self) -> int:
        """How many of them were kept."""
        return self.left.shape[1]


def factorised(delta: Delta, noise: float = 0.0, most: int | None = None) -> Factors:
    """Return balanced factors of ``delta``.

    What is kept are the largest singular values: as few as leave no more than ``noise`` (Frobenius norm) out, and at
    most ``most``.
    """
    left, values, right = _svd(delta)
    # What is left out if the first 0, 1, 2, … are kept.
    rest = values.square().flip(0).cumsum(0).sqrt().flip(0)
    floor = max(noise, float(torch.finfo(values.dtype).eps) * max(len(left), len(right)) * float(values.sum()))
    rank = int((rest > floor).sum())
    kept = rank if most is None else min(rank, most)
    roots = values[:kept].sqrt()
    lost, whole = float(rest[kept]) if kept < len(rest) else 0.0, float(rest[0]) if len(rest) else 0.0
    return Factors(left[:, :kept] * roots, right[:, :kept] * roots, lost / whole if whole else 0.0, rank)


def _svd(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (d_out, r), the singular values in descending order, and V (d_in, r), in float64."""
    if not isinstance(delta, LowRank) or delta.left.shape[1] >= min(len(delta.left), len(delta.right)):
        left, values, right = torch.linalg.svd(delta.dense().double(), full_matrices=False)
        return left, values, right.T
    # Of a product of factors only the small middle has to be decomposed.
    outer_left, small_left = torch.linalg.qr(delta.left.double())
    outer_right, small_right = torch.linalg.qr(delta.right.double())
    left, values, right = torch.linalg.svd(small_left @ small_right.T)
    return outer_left @ left, values, outer_right @ right.T


def rounding(weight: Tensor, dtype: torch.dtype, times: int = 1) -> float:
    """Bound the Frobenius norm of what rounding ``weight`` to ``dtype`` adds to a change, ``times`` over.

    One rounding moves a value by at most eps / 2 of itself, and by about 0.2 eps on average; errors of several add
    up like a random walk.
    """
    return float(torch.finfo(dtype).eps) / 2 * float(weight.double().norm()) * max(1, times) ** 0.5
