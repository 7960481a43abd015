"""Copies of a down projection that some sequences go through instead of it, told by how far they move activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.engine.beside import LayerMemory
from everedit.models.calls import Call

__all__ = ["SideMemory", "margin_loss", "replay_loss", "shift_of_activations"]

_LONG = 100

Activation = Callable[[Tensor], Tensor]


def shift_of_activations(keys: Tensor, outputs: Tensor, added: Tensor, act: Activation, real: Tensor) -> Tensor:
    """Return how far a memory moves each row, (rows,): the mean over real tokens of ||phi(out + added) - phi(out)||.

    ``outputs`` and ``added`` are (rows, length, H). A text of more than 100 tokens takes the largest instead of the
    mean, as the released code does.
    """
    moved = (act(outputs.float() + added) - act(outputs.float())).norm(dim=-1)
    counts = real.sum(1)
    mean = (moved * real).sum(1) / counts.clamp_min(1)
    return torch.where(counts > _LONG, (moved * real).amax(1), mean)


def margin_loss(inside: Tensor, outside: Tensor, margins: tuple[float, float | Tensor, float]) -> Tensor:
    """Return [D(x_i) - alpha]_+ + [beta - D(x_e)]_+ + [gamma - (D(x_e) - D(x_i))]_+, each over its positive entries.

    ``inside`` (n,) are the scores of an edit's texts, ``outside`` () that of a text it is not about; beta is one number
    or one for each of the edit's texts.
    """
    alpha, beta, gamma = margins
    brackets = (outside[None] - alpha, beta - inside, gamma - (inside - outside))
    return torch.stack([_mean_of_positive(bracket) for bracket in brackets]).sum()


def replay_loss(same: Tensor, others: Tensor, alpha: float, beta: float | Tensor) -> Tensor:
    """Return [D(x_m) - alpha]_+ over edits of other memories plus [beta - D(x_s)]_+ over edits of the same one."""
    return _mean_of_positive(others - alpha) + _mean_of_positive(beta - same)


def _mean_of_positive(bracket: Tensor) -> Tensor:
    positive = bracket > 0
    return (bracket * positive).sum() / positive.sum().clamp_min(1)


@dataclass
class SideMemory(LayerMemory):
    """Changes (m, H, D) of a down projection, and the score (m,) above which each answers."""

    layer: int
    changes: Tensor
    limits: Tensor
    act: Activation
    hold: bool = True

    def scores(self, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
        """Return how far each memory moves each row, (rows, m)."""
        moved = [shift_of_activations(key, value, F.linear(key.float(), w), self.act, real) for w in self.changes]
        return torch.stack(moved, 1)

    def chosen(self, key: Tensor, value: Tensor, real: Tensor) -> Tensor:
        """Return the memory that answers each row: the one that moves it most of those above their limit; -1: none."""
        scores = self.scores(key, value, real)
        best = torch.where(scores > self.limits, scores, -torch.inf).max(1)
        return torch.where(best.values > -torch.inf, best.indices, -1)

    def change(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Send the rows that a memory answers through it."""

        def decide() -> Tensor:
            return self.chosen(key, value, call.real)

        chosen = call.decided("wise", decide) if self.hold else decide()
        for memory in chosen.unique().tolist():
            if memory >= 0:
                rows = (chosen == memory).nonzero()[:, 0]
                added = F.linear(key[rows].float(), self.changes[memory]).to(value.dtype)
                value = value.index_put((rows,), value[rows] + added)
        return value
