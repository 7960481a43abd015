"""What a method or a policy carries from edit to edit: tensors and plain values, saved with the stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from everedit.patch import plus_outer

__all__ = ["Growing", "Growth", "State"]


@dataclass(frozen=True)
class Growth:
    """How a symmetric matrix (D, D) came from the one ``before``: by ``sign * factor @ factor.T``, factor (D, r).

    A journal of edits keeps the factor, which is as small as the edit, instead of the matrix. Without a matrix before
    it is ``start`` times the identity. ``keys`` (D, n) are what the step was solved for, where the factor is not.
    """

    factor: Tensor
    sign: int = 1
    before: Tensor | None = None
    start: float | None = None
    keys: Tensor | None = None

    def after(self) -> Tensor:
        """Return the matrix after the step, float64, with the same bits wherever it is computed."""
        before = self.before
        if before is None:
            assert self.start is not None
            size, device = len(self.factor), self.factor.device
            before = self.start * torch.eye(size, dtype=torch.float64, device=device)
        return plus_outer(before.to(self.factor.device), self.sign * self.factor, self.factor)


class Growing(dict[str, Tensor]):
    """The tensors of a state in the making, which remembers how matrices grew."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__(tensors or {})
        self.grown: dict[str, Growth] = {}

    def grow(
        self, name: str, factor: Tensor, sign: int = 1, *, start: float | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Add ``sign * factor @ factor.T`` to the matrix ``name`` and return it; one that is not there yet begins at
        ``start`` times the identity. ``keys`` are what the step was solved for.
        """
        growth = Growth(factor, sign, self.get(name), start, keys)
        self[name], self.grown[name] = growth.after(), growth
        return self[name]


@dataclass(frozen=True)
class State:
    """An immutable bag of ``tensors`` and JSON-like ``values``. Each step returns a new one.

    ``grown`` tells of matrices how they came from those of the state before.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    grown: dict[str, Growth] = field(default_factory=dict, repr=False, compare=False)
