"""The weights that a stream changes: their original bits, and float32 masters that edits add up in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.errors import NumericalError
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import Patch

__all__ = ["EditedWeights", "Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """The masters (d_out, d_in) at one moment, by parameter name; a weight not in it is as in the base model."""

    masters: dict[str, Tensor]


class EditedWeights:
    """Adds patches to a model's weights and can always give the original bits back.

    A new weight is computed aside in float64, checked, kept in float32, and written once in the model's dtype,
    so that small edits add up even where the model's dtype would swallow each of them.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._originals: dict[str, Tensor] = {}
        self._masters: dict[str, Tensor] = {}
        self._detached = 0

    def _weight(self, name: str) -> Tensor:
        return oriented(self.lm.layout.module_of(name))

    def base(self, name: str) -> Tensor:
        """Return the original weight (d_out, d_in) in float32."""
        return self._originals.get(name, self._weight(name)).float()

    def shift(self, name: str) -> Tensor:
        """Return S = W_now - W_base (d_out, d_in) in float64."""
        if name not in self._masters:
            return torch.zeros_like(self._weight(name), dtype=torch.float64)
        return self._masters[name].double() - self._originals[name].double()

    def names(self) -> list[str]:
        """Return the names of the changed weights."""
        return sorted(self._masters)

    def commit(self, patch: Patch) -> None:
        """Add a patch. Raises :class:`NumericalError` and changes nothing if a new weight is not finite."""
        patch.require_finite()
        fresh: dict[str, Tensor] = {}
        for name, delta in patch.deltas.items():
            now = self._masters.get(name, self._weight(name))
            # In rows, as it comes back from a file: how a tensor lies in memory decides how sums over it round.
            master = (now.double() + delta.dense().double().to(now.device)).float().contiguous()
            if not bool(torch.isfinite(master.to(self._weight(name).dtype)).all()):
                raise NumericalError(what="an edited weight would not be finite; nothing was written", where=name)
            fresh[name] = master
        for name, master in fresh.items():
            self._write(name, master)

    def _write(self, name: str, master: Tensor) -> None:
        weight = self._weight(name)
        if name not in self._originals:
            self._originals[name] = weight.clone()
        self._masters[name] = master
        weight.copy_(master)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Put the original bits into the model while the block runs; blocks may be nested."""
        for name, original in self._originals.items():
            self._weight(name).copy_(original)
        self._detached += 1
        try:
            yield
        finally:
            self._detached -= 1
            if not self._detached:
                for name, master in self._masters.items():
                    self._weight(name).copy_(master)

    def snapshot(self) -> Snapshot:
        """Return the present state; cheap, since masters are replaced and never changed in place."""
        return Snapshot(dict(self._masters))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, bit for bit."""
        for name in list(self._masters):
            if name not in snapshot.masters:
                self._weight(name).copy_(self._originals.pop(name))
                del self._masters[name]
        for name, master in snapshot.masters.items():
            self._write(name, master.to(self._weight(name).device))

    def norm_ratios(self) -> dict[str, float]:
        """Return ||W_now|| / ||W_base|| of each changed weight."""
        return {
            name: float(master.norm() / self._originals[name].float().norm()) for name, master in self._masters.items()
        }
