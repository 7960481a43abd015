"""Low-rank factors of a change: its singular value decomposition, cut at a rank or where only rounding is left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.patch import Delta, LowRank

__all__ = ["Factors", "factorised", "rounding"]

_SKETCHES = (16, 64, 256)


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


@dataclass(frozen=True)
class _Decomposed:
    """U (d_out, r), singular values in descending order, V (d_in, r), and the norm of what these leave out."""

    left: Tensor
    values: Tensor
    right: Tensor
    left_out: float = 0.0


def factorised(delta: Delta, noise: float = 0.0, most: int | None = None) -> Factors:
    """Return balanced factors of ``delta``.

    What is kept are the largest singular values: as few as leave no more than ``noise`` (Frobenius norm) out, and at
    most ``most``.
    """
    found = _decomposed(delta, noise)
    values = found.values
    # What is left out if the first 0, 1, 2, … are kept.
    rest = (values.square().flip(0).cumsum(0).flip(0) + found.left_out**2).sqrt()
    floor = max(
        noise, float(torch.finfo(values.dtype).eps) * max(len(found.left), len(found.right)) * float(values.sum())
    )
    rank = int((rest > floor).sum())
    kept = rank if most is None else min(rank, most)
    roots = values[:kept].sqrt()
    lost, whole = float(rest[kept]) if kept < len(rest) else found.left_out, float(rest[0]) if len(rest) else 0.0
    return Factors(found.left[:, :kept] * roots, found.right[:, :kept] * roots, lost / whole if whole else 0.0, rank)


def _decomposed(delta: Delta, noise: float) -> _Decomposed:
    if isinstance(delta, LowRank) and delta.left.shape[1] < min(len(delta.left), len(delta.right)):
        # Of a product of factors only the small middle has to be decomposed.
        outer_left, small_left = torch.linalg.qr(delta.left.double())
        outer_right, small_right = torch.linalg.qr(delta.right.double())
        left, values, right = torch.linalg.svd(small_left @ small_right.T)
        return _Decomposed(outer_left @ left, values, outer_right @ right.T)
    matrix = delta.dense().double()
    for width in _SKETCHES:
        if 2 * width < min(matrix.shape) and (found := _sketched(matrix, width, noise)):
            return found
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _Decomposed(left, values, right.T)


def _sketched(matrix: Tensor, width: int, noise: float) -> _Decomposed | None:
    """Decompose what a random sketch of ``width`` columns sees of a matrix; None if it leaves out more than ``noise``.

    A change of low rank comes out of some products of thin matrices, and no large one has to be decomposed.
    """
    made = torch.Generator().manual_seed(width)
    sketch = torch.randn(matrix.shape[1], width, generator=made, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    small = basis.T @ matrix
    left_out = float((matrix - basis @ small).norm())
    if left_out > noise:
        return None
    left, values, right = torch.linalg.svd(small, full_matrices=False)
    return _Decomposed(basis @ left, values, right.T, left_out)


def rounding(weight: Tensor, dtype: torch.dtype, times: int = 1) -> float:
    """Bound the Frobenius norm of what rounding ``weight`` to ``dtype`` adds to a change, ``times`` over.

    One rounding moves a value by at most eps / 2 of itself, and by about 0.2 eps on average; errors of several add
    up like a random walk.
    """
    return float(torch.finfo(dtype).eps) / 2 * float(weight.double().norm()) * max(1, times) ** 0.5
