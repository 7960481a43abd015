"""How a vector moves in the value optimisation, one row for each edit: rows can be dropped once they have arrived."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Adam", "Descent", "Strides"]

# Half of a stride's direction is what was. With the usual nine tenths a vector overshoots: Adam makes a third more
# steps with nine tenths than with a half, to a vector 1.6 times as long (SmolLM2, docs/results/settings.md).
_MOMENTUM = 0.5


class Descent(Protocol):
    """Moves vectors (rows, places, H) against their gradients."""

    def step(self, vector: Tensor, gradient: Tensor) -> Tensor:
        """Return the vectors after a step."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""


class Adam:
    """Adam over the rows of one tensor (Kingma & Ba, algorithm 1)."""

    def __init__(self, like: Tensor, lr: float) -> None:
        self.lr, self.step_count = lr, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, vector: Tensor, gradient: Tensor) -> Tensor:
        """Return the vectors after a step, each number moved by about the learning rate."""
        self.step_count += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient**2
        mean = self.mean / (1 - 0.9**self.step_count)
        square = self.square / (1 - 0.999**self.step_count)
        return vector - self.lr * mean / (square.sqrt() + 1e-8)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.mean, self.square = self.mean[rows], self.square[rows]


class Strides:
    """Steps of one length along the mean of the gradients' directions, in which the last ones count most.

    ``lengths`` (rows, places) are those of the steps. A gradient gives the direction, with its numbers in proportion,
    where Adam moves each by about the same; how long it is plays no part. An own choice, of no paper.
    """

    def __init__(self, like: Tensor, lengths: Tensor) -> None:
        self.lengths, self.step_count = lengths, 0
        self.mean = torch.zeros_like(like)

    def step(self, vector: Tensor, gradient: Tensor) -> Tensor:
        """Return the vectors after a step, no longer than ``lengths``."""
        self.step_count += 1
        direction = gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        self.mean = _MOMENTUM * self.mean + (1 - _MOMENTUM) * direction
        return vector - self.lengths[..., None] * self.mean / (1 - _MOMENTUM**self.step_count)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.mean, self.lengths = self.mean[rows], self.lengths[rows]
