"""Neurons beside an MLP: out + act(q K^T + b) V, or act(q G^T) * (q K^T) V where the model's own are gated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from everedit.engine.beside import LayerMemory
from everedit.models.calls import Call

__all__ = ["Slots"]


@dataclass
class Slots(LayerMemory):
    """``keys`` and ``values`` (n, H), ``biases`` (n,) and, for gated neurons, ``gates`` (n, H)."""

    layer: int
    act: Callable[[Tensor], Tensor]
    keys: Tensor
    values: Tensor
    biases: Tensor | None = None
    gates: Tensor | None = None

    def added(self, query: Tensor) -> Tensor:
        """Return what the neurons add to the MLP's output at its inputs ``query`` (…, H)."""
        query = query.float()
        reads = F.linear(query, self.keys, self.biases)
        active = self.act(reads) if self.gates is None else self.act(F.linear(query, self.gates)) * reads
        return active @ self.values

    def change(self, call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Add what the neurons say; they act at every token."""
        return value + self.added(query).to(value.dtype)
