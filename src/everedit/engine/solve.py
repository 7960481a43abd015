"""The least-squares problems behind the edits: pure functions of float64 tensors.

Letters: K (D, n) keys, R (H, n) residuals, C (D, D) second moment E[k k^T], W (H, D) the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.errors import NumericalError
from everedit.patch import LowRank, plus_outer

__all__ = [
    "Factor",
    "equality_update",
    "largest_singular_value",
    "rank_one_update",
    "recursive_gain",
    "recursive_step",
    "ridge_update",
]


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a symmetric positive definite matrix, for solving with it many times."""

    lower: Tensor

    @classmethod
    def of(cls, matrix: Tensor, ridge: float = 0.0) -> Factor:
        """Factorise ``matrix + ridge * mean(diag) * I`` in float64.

        Raises :class:`NumericalError` if it is not finite or not positive definite.
        """
        square = matrix.double()
        if ridge:
            square = square + ridge * square.diagonal().mean() * torch.eye(
                len(square), dtype=square.dtype, device=square.device
            )
        if not bool(torch.isfinite(square).all()):
            raise NumericalError(
                what="the system holds values that are not finite; nothing was written",
                fix="look at what goes into it: keys, targets or second moments are damaged",
            )
        lower, failed = torch.linalg.cholesky_ex(square)
        if int(failed):
            raise NumericalError(
                what="the system is not positive definite, so it has no stable solution",
                fix="gather the second moments over more tokens than the layer is wide, or raise the ridge",
            )
        return cls(lower)

    def solve(self, right: Tensor) -> Tensor:
        """Return matrix^-1 @ right, float64."""
        return torch.cholesky_solve(right.double(), self.lower)


def rank_one_update(factor: Factor | None, direction_key: Tensor, write_key: Tensor, residual: Tensor) -> LowRank:
    """Return ROME's change: with u = C^-1 k / ||C^-1 k||, Delta = r u^T / (u . k').

    ``direction_key`` k (D,) gives the direction, ``write_key`` k' (D,) is mapped exactly: Delta k' = r (H,). Without a
    ``factor`` C is the identity.
    Raises :class:`NumericalError` when u . k' is so small that the change would explode.
    """
    u = direction_key.double() if factor is None else factor.solve(direction_key[:, None])[:, 0]
    u = u / u.norm()
    inner = u @ write_key.double()
    if not bool(inner.abs() > 1e-6 * write_key.double().norm()):
        raise NumericalError(
            what="the key is almost orthogonal to the update's direction, so the change would explode",
            fix="use the same key in all places (method r-rome), or another layer",
        )
    return LowRank((residual.double() / inner)[:, None], u[:, None])


def ridge_update(factor: Factor, weight: float, keys: Tensor, residuals: Tensor) -> LowRank:
    """Return MEMIT's change R K^T (w C + K K^T)^-1, by the n x n system (I + K^T M K) with M = (w C)^-1.

    ``factor`` is of C and computed once a layer; ``weight`` is w. Costs n D^2 + n^2 D, not D^3.
    """
    k, r = keys.double(), residuals.double()
    mk = factor.solve(k) / weight
    gram = torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + k.T @ mk
    # right = M K (I + K^T M K)^-1; the gram matrix is symmetric positive definite.
    right = Factor.of((gram + gram.T) / 2).solve(mk.T).T
    return LowRank(r, right)


def equality_update(factor: Factor, scale: float, ridge: float, keys: Tensor, residuals: Tensor) -> LowRank:
    """Return EMMET's change R (K^T M K + ridge I)^-1 K^T M with M = (scale C)^-1, which for ridge 0 maps K to R.

    Raises :class:`NumericalError` if the keys depend on each other and there is no ridge.
    """
    k, r = keys.double(), residuals.double()
    mk = factor.solve(k) / scale
    gram = k.T @ mk
    gram = (gram + gram.T) / 2 + ridge * torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    lower, failed = torch.linalg.cholesky_ex(gram)
    # Of keys that depend on each other the last pivot is rounding, of either sign.
    independent = not int(failed) and bool((lower.diagonal().square() > 1e-12 * gram.diagonal()).all())
    if not independent and bool(torch.isfinite(gram).all()):
        raise NumericalError(
            what="the keys of this batch depend on each other, so that their values cannot all be met",
            fix="leave out edits of the same subject and prompt, or give a ridge",
        )
    # What is not finite has an error of its own here.
    factor = Factor(lower) if independent else Factor.of(gram)
    return LowRank(r, factor.solve(mk.T).T)


def recursive_gain(inverse: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return (G, new inverse) when K K^T is added to P: G = P'^-1 K, by the Woodbury identity.

    ``inverse`` is P^-1 (D, D) float64. G = P^-1 K (I + K^T P^-1 K)^-1, and P'^-1 = P^-1 - G K^T P^-1.
    """
    gain, root = recursive_step(inverse, keys)
    return gain, plus_outer((inverse + inverse.T) / 2, -root, root)


def recursive_step(inverse: Tensor, keys: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    """Return (G, B), both (D, n), of the step that adds K K^T to P: G = P'^-1 K, and P'^-1 = P^-1 - B B^T.

    With the Cholesky factor L of I + K^T P^-1 K it is B = P^-1 K L^-T, so that the new inverse is symmetric to the bit.
    With ``sign=-1`` K K^T is taken out of P: then L is of I - K^T P^-1 K, and P'^-1 = P^-1 + B B^T.

    Raises :class:`NumericalError` if what would be left is not positive definite.
    """
    k = keys.double()
    pk = inverse @ k
    gram = torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + sign * (k.T @ pk)
    factor = Factor.of((gram + gram.T) / 2)
    root = torch.linalg.solve_triangular(factor.lower, pk.T, upper=False).T
    return factor.solve(pk.T).T, root


def largest_singular_value(matrix: Tensor) -> float:
    """Return the largest singular value of a matrix, from the smaller of its Gram matrices."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return float(torch.linalg.eigvalsh(wide @ wide.T)[-1].clamp_min(0).sqrt())
