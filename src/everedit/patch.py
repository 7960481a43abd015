"""Reversible changes to a model: what a method returns and a policy combines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from everedit.cache import atomic_write
from everedit.errors import CacheError, NumericalError

__all__ = ["Delta", "Dense", "LowRank", "Patch", "load_tensors", "plus_outer", "save_tensors"]

_BLOCK = 1 << 17


@dataclass(frozen=True)
class LowRank:
    """The change ``left @ right.T`` of a weight (d_out, d_in): ``left`` (d_out, r), ``right`` (d_in, r)."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape (d_out, d_in) of the weight that it changes."""
        return torch.Size((len(self.left), len(self.right)))

    def dense(self) -> Tensor:
        """Return the change as one matrix (d_out, d_in)."""
        return self.left @ self.right.T

    def added_to(self, weight: Tensor) -> Tensor:
        """Return ``weight`` (d_out, d_in) with the change added, float64, with the same bits on every machine."""
        return plus_outer(weight, self.left, self.right)

    def scaled(self, factor: float) -> LowRank:
        """Return ``factor`` times the change."""
        return LowRank(self.left * factor, self.right)

    def norm(self) -> float:
        """Frobenius norm, from the two r x r Gram matrices alone."""
        grams = (self.left.T @ self.left) * (self.right.T @ self.right)
        return float(grams.sum().clamp_min(0).sqrt())

    def rank(self) -> int:
        """Numerical rank."""
        # The change has the rank of R_left R_right.T, which is r x r.
        small = torch.linalg.qr(self.left.double())[1] @ torch.linalg.qr(self.right.double())[1].T
        return _rank(small, max(len(self.left), len(self.right)), self.left.dtype)

    def apply(self, keys: Tensor) -> Tensor:
        """Return the change's effect on ``keys`` (d_in, n), as (d_out, n)."""
        return self.left @ (self.right.T @ keys)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name."""
        return {"left": self.left, "right": self.right}

    def to(self, *args: Any) -> LowRank:
        """Return a copy with dtype or device changed."""
        return LowRank(self.left.to(*args), self.right.to(*args))


@dataclass(frozen=True)
class Dense:
    """A change of a weight given as a full matrix (d_out, d_in)."""

    matrix: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape (d_out, d_in) of the weight that it changes."""
        return self.matrix.shape

    def dense(self) -> Tensor:
        """Return the matrix itself."""
        return self.matrix

    def added_to(self, weight: Tensor) -> Tensor:
        """Return ``weight`` (d_out, d_in) with the change added, float64."""
        return weight.double() + self.matrix.to(weight.device).double()

    def scaled(self, factor: float) -> Dense:
        """Return ``factor`` times the change."""
        return Dense(self.matrix * factor)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.matrix.norm())

    def rank(self) -> int:
        """Numerical rank."""
        return _rank(self.matrix.double(), max(self.matrix.shape), self.matrix.dtype)

    def apply(self, keys: Tensor) -> Tensor:
        """Return the change's effect on ``keys`` (d_in, n), as (d_out, n)."""
        return self.matrix @ keys

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name."""
        return {"matrix": self.matrix}

    def to(self, *args: Any) -> Dense:
        """Return a copy with dtype or device changed."""
        return Dense(self.matrix.to(*args))


def plus_outer(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``matrix + left @ right.T`` in float64, added up column by column: ``left`` (n, r), ``right`` (m, r).

    A matrix product rounds as the machine's library sees fit. Here each product and each sum is rounded by itself, in
    one order, so that what is added up again later, or elsewhere, has the same bits.
    """
    total = matrix.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    left, rows = left.to(total), right.to(total).T.contiguous()
    step = max(1, _BLOCK // max(1, total.shape[1]))
    for start in range(0, len(total), step):
        block, parts = total[start : start + step], left[start : start + step]
        product = torch.empty_like(block)
        for column, row in enumerate(rows):
            block += torch.mul(parts[:, column, None], row, out=product)
    return total


def _rank(matrix: Tensor, size: int, dtype: torch.dtype) -> int:
    # The rounding of the dtype that the values come in is noise, however precisely they are looked at.
    return int(torch.linalg.matrix_rank(matrix, rtol=size * torch.finfo(dtype).eps)) if matrix.numel() else 0


Delta = LowRank | Dense


@dataclass(frozen=True)
class Patch:
    """Changes of weights by parameter name, always oriented (d_out, d_in) whichever way they are stored.

    ``memory`` holds what was written beside the weights instead, by name; the method's state holds it too, and what
    the model shows is made from there. ``info`` says where the patch comes from (method, model fingerprint, edit ids);
    it is saved with it.
    """

    deltas: Mapping[str, Delta]
    info: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def norm(self) -> float:
        """Frobenius norm over all that was changed or written."""
        squares = [delta.norm() ** 2 for delta in self.deltas.values()]
        return math.sqrt(sum(squares) + sum(float(tensor.norm()) ** 2 for tensor in self.memory.values()))

    def rank(self) -> int:
        """The largest rank among the changed weights."""
        return max((delta.rank() for delta in self.deltas.values()), default=0)

    def scaled(self, factor: float) -> Patch:
        """Return the patch with ``factor`` times the changes of weights."""
        return Patch({name: delta.scaled(factor) for name, delta in self.deltas.items()}, self.info, self.memory)

    def require_finite(self) -> None:
        """Raise :class:`NumericalError` if any value is not finite."""
        parts = {name: list(delta.tensors().values()) for name, delta in self.deltas.items()}
        for name, tensors in (parts | {name: [tensor] for name, tensor in self.memory.items()}).items():
            if not all(bool(torch.isfinite(part).all()) for part in tensors):
                raise NumericalError(
                    what="the computed change holds values that are not finite; nothing was written",
                    where=name,
                    fix="lower the learning rate or the clamp, or raise the weight of the second moments",
                )

    def save(self, path: Path) -> None:
        """Write the patch as safetensors, atomically."""
        tensors = {f"{name}|{part}": t for name, d in self.deltas.items() for part, t in d.tensors().items()}
        tensors |= {f"{name}|memory": tensor for name, tensor in self.memory.items()}
        save_tensors(path, tensors, dict(self.info))

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a patch back. Raises :class:`CacheError` if the file is not a whole patch."""
        tensors, info = load_tensors(path)
        grouped: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("|")
            grouped.setdefault(name, {})[part] = tensor
        deltas: dict[str, Delta] = {}
        memory: dict[str, Tensor] = {}
        for name, parts in grouped.items():
            flat = all(part.ndim == 2 and part.dtype.is_floating_point for part in parts.values())
            if flat and set(parts) == {"left", "right"} and parts["left"].shape[1] == parts["right"].shape[1]:
                deltas[name] = LowRank(**parts)
            elif flat and set(parts) == {"matrix"}:
                deltas[name] = Dense(**parts)
            elif set(parts) == {"memory"} and parts["memory"].dtype.is_floating_point:
                memory[name] = parts["memory"]
            else:
                raise CacheError(what=f"'{name}' holds no change of a weight", where=str(path), fix="save it again")
        return cls(deltas, info, memory)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any] | None = None) -> None:
    """Write tensors and JSON-like ``info`` as one safetensors file, atomically."""
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole[name] = _own(tensor.detach().cpu().contiguous(), seen)
    metadata = {"info": json.dumps(dict(info or {}))}
    try:
        atomic_write(path, lambda scratch: save_file(whole, scratch, metadata=metadata))
    except SafetensorError as error:
        # What the disk refuses in the middle of a file comes as an error of the library's own.
        raise CacheError(
            what=f"cannot write {path.name}: {error}",
            where=str(path.parent),
            fix="choose a folder you may write to and that has space",
        ) from error


def _own(tensor: Tensor, seen: set[int]) -> Tensor:
    """Return the tensor with a storage of its own: safetensors refuses two tensors that share one."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen:
        seen.add(storage.data_ptr())
        return tensor
    return tensor.clone()


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote. Raises :class:`CacheError` if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            info = json.loads((file.metadata() or {}).get("info", "{}"))
            if not isinstance(info, dict):
                raise ValueError("what it says of itself is not an object with named fields")
            return tensors, info
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CacheError(
            what=f"the file is damaged: {error}", where=str(path), fix="delete it; it is made again"
        ) from error
