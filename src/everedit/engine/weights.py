"""The weights that a stream changes: their original bits, and float32 masters that edits add up in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from everedit.engine.solve import largest_singular_value
from everedit.errors import NumericalError
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import Delta, Dense, Patch

__all__ = ["EditedWeights", "Snapshot", "moved"]

ReadOut = Callable[[Tensor, Tensor], Tensor]
Face = Literal["base", "stream", "shown"]


@dataclass(frozen=True)
class Snapshot:
    """The masters (d_out, d_in) at one moment, by parameter name; a weight not in it is as in the base model."""

    masters: dict[str, Tensor]


def moved(weight: Tensor, delta: Delta) -> Tensor:
    """Return the float32 master (d_out, d_in) of ``weight`` after a change; the same bits wherever it is computed."""
    # In rows, as it comes back from a file: how a tensor lies in memory decides how sums over it round.
    return delta.added_to(weight).float().contiguous()


class EditedWeights:
    """Adds patches to a model's weights and can always give the original bits back.

    A new weight is computed aside in float64, checked, kept in float32, and written once in the model's dtype,
    so that small edits add up even where the model's dtype would swallow each of them. With a ``read_out``, a function
    of the original weight and the stream's change of it (both float64), the model shows what that makes of the change,
    while the stream goes on from the change itself.
    """

    def __init__(self, lm: LanguageModel, read_out: ReadOut | None = None) -> None:
        self.lm = lm
        self._read_out = read_out
        self._originals: dict[str, Tensor] = {}
        self._masters: dict[str, Tensor] = {}
        self._shown: dict[str, Tensor] = {}
        self._largest: dict[str, float] = {}
        self._face: Face = "shown"

    def _weight(self, name: str) -> Tensor:
        return oriented(self.lm.layout.module_of(name))

    def base(self, name: str) -> Tensor:
        """Return the original weight (d_out, d_in) in float32."""
        return self._originals.get(name, self._weight(name)).float()

    def master(self, name: str) -> Tensor | None:
        """Return the float32 weight (d_out, d_in) behind what the model holds now; None where it has no other."""
        return self._masters.get(name) if self._face == "stream" else None

    def shift(self, name: str) -> Tensor:
        """Return S = W_now - W_base (d_out, d_in) in float64."""
        if name not in self._masters:
            return torch.zeros_like(self._weight(name), dtype=torch.float64)
        return self._masters[name].double() - self._originals[name].double()

    def net_change(self) -> Patch:
        """Return what the model shows of each changed weight less the original, in float64, which loses no bit."""
        return Patch(_Differences(dict(self._originals), dict(self._shown)))

    def names(self) -> list[str]:
        """Return the names of the changed weights."""
        return sorted(self._masters)

    def commit(self, patch: Patch) -> None:
        """Add a patch. Raises :class:`NumericalError` and changes nothing if a new weight is not finite."""
        patch.require_finite()
        fresh: dict[str, Tensor] = {}
        for name, delta in patch.deltas.items():
            now = self._masters.get(name, self._weight(name))
            master = moved(now, delta)
            if not bool(torch.isfinite(master.to(self._weight(name).dtype)).all()):
                raise NumericalError(what="an edited weight would not be finite; nothing was written", where=name)
            fresh[name] = master
        shown = {name: self._seen_from_outside(name, master) for name, master in fresh.items()}
        for name, master in fresh.items():
            self._take(name, master, shown[name])

    def _take(self, name: str, master: Tensor, shown: Tensor) -> None:
        weight = self._weight(name)
        if name not in self._originals:
            self._originals[name] = weight.clone()
        self._masters[name], self._shown[name] = master, shown
        weight.copy_(self._on(self._face, name))

    def _seen_from_outside(self, name: str, master: Tensor) -> Tensor:
        if self._read_out is None:
            return master
        base = self._originals.get(name, self._weight(name)).double()
        shown = (base + self._read_out(base, master.double() - base)).float().contiguous()
        if not bool(torch.isfinite(shown).all()):
            raise NumericalError(what="an edited weight would not be finite; nothing was written", where=name)
        return shown

    def _on(self, face: Face, name: str) -> Tensor:
        return {"base": self._originals, "stream": self._masters, "shown": self._shown}[face][name]

    @contextmanager
    def showing(self, face: Face) -> Iterator[None]:
        """Put other weights into the model while the block runs: the original bits (``base``), the stream's own, or
        what is shown outside; blocks may be nested.
        """
        before, self._face = self._face, face
        self._put(before, face)
        try:
            yield
        finally:
            self._face = before
            self._put(face, before)

    def _put(self, now: Face, face: Face) -> None:
        for name in self._masters:
            if self._on(now, name) is not self._on(face, name):
                self._weight(name).copy_(self._on(face, name))

    def detached(self) -> AbstractContextManager[None]:
        """Put the original bits into the model while the block runs; blocks may be nested."""
        return self.showing("base")

    def snapshot(self) -> Snapshot:
        """Return the present state; cheap, since masters are replaced and never changed in place."""
        return Snapshot(dict(self._masters))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot, bit for bit."""
        for name in list(self._masters):
            if name not in snapshot.masters:
                self._weight(name).copy_(self._originals.pop(name))
                del self._masters[name], self._shown[name]
        for name, saved in snapshot.masters.items():
            master = saved.to(self._weight(name).device)
            if self._masters.get(name) is not master:
                self._take(name, master, self._seen_from_outside(name, master))

    def norm_ratios(self) -> dict[str, float]:
        """Return ||W|| / ||W_base|| of each changed weight, as the model holds it now."""
        return {
            name: float(self._on(self._face, name).float().norm() / original.float().norm())
            for name, original in self._originals.items()
        }

    def singular_value_ratios(self) -> dict[str, float]:
        """Return s_max(W) / s_max(W_base) of each changed weight, as the model holds it now."""
        for name, original in self._originals.items():
            if name not in self._largest:
                self._largest[name] = largest_singular_value(original)
        return {
            name: largest_singular_value(self._on(self._face, name)) / self._largest[name] for name in self._originals
        }


@dataclass(frozen=True)
class _Differences(Mapping[str, Delta]):
    """Dense changes, each computed when it is asked for: all of them together may be larger than the model."""

    originals: dict[str, Tensor]
    shown: dict[str, Tensor]

    def __getitem__(self, name: str) -> Dense:
        return Dense(self.shown[name].double() - self.originals[name].double())

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.shown))

    def __len__(self) -> int:
        return len(self.shown)
