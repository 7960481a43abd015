"""Running mean and variance of rows that come in pieces, equal to those of all rows together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RunningMoments"]


@dataclass(frozen=True)
class RunningMoments:
    """``count`` rows with ``mean`` (d,) and ``squares`` (d,), the sum of squared deviations from it; float64."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> RunningMoments:
        """Return those of rows (n, d)."""
        wide = rows.double()
        mean = wide.mean(0)
        return cls(len(wide), mean, (wide - mean).pow(2).sum(0))

    def joined(self, other: RunningMoments) -> RunningMoments:
        """Return those of both sets of rows (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        squares = self.squares + other.squares + step.pow(2) * (self.count * other.count / count)
        return RunningMoments(count, mean, squares)

    def deviation(self) -> Tensor:
        """Return the standard deviation (d,) with n - 1 in the denominator; 0 for a single row."""
        return (self.squares / max(1, self.count - 1)).sqrt()

    def normalised(self, rows: Tensor) -> Tensor:
        """Return rows (n, d) less the mean over the deviation; a component that hardly varies stays small."""
        deviation = self.deviation()
        floor = torch.maximum(1e-6 * deviation.mean(), torch.tensor(torch.finfo(torch.float32).eps).to(deviation))
        return (rows.double() - self.mean) / deviation.clamp_min(floor)
