"""What a method or a policy carries from edit to edit: tensors and plain values, saved with the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """An immutable bag of ``tensors`` and JSON-like ``values``. Each step returns a new one."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
