"""A stream's state as tensors and plain values, and back: for run folders, and for a ledger's snapshots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.engine.weights import Snapshot
from everedit.outcome import StreamState

__all__ = ["pack", "pack_targets", "unpack", "unpack_targets"]

_PARTS = ("origin", "delta", "before")


def pack(state: StreamState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state as tensors by name and JSON-like values."""
    tensors = {f"weights|{name}": master for name, master in state.weights.masters.items()}
    for kind, bag in (("method", state.method), ("policy", state.policy)):
        tensors.update({f"{kind}|{name}": tensor for name, tensor in bag.tensors.items()})
    targets, pending = pack_targets(state.pending)
    info = {"method": state.method.values, "policy": state.policy.values, "pending": pending}
    return tensors | targets, {**info, "made_by": state.made_by}


def unpack(tensors: dict[str, Tensor], info: dict[str, Any], device: torch.device) -> StreamState:
    """Return the state that :func:`pack` gave. Raises ``KeyError`` or ``TypeError`` if something is missing."""
    bags: dict[str, dict[str, Tensor]] = {"weights": {}, "method": {}, "policy": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("|")
        if kind in bags:
            # A copy of its own: a file's tensors lie at odd addresses, where products round differently.
            bags[kind][name] = tensor.to(device, copy=True)
    return StreamState(
        Snapshot(bags["weights"]),
        State(bags["method"], dict(info["method"])),
        State(bags["policy"], dict(info["policy"])),
        unpack_targets(tensors, info["pending"], device),
        dict(info["made_by"]),
    )


def pack_targets(targets: dict[str, Target]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return solved values, by edit, as tensors by name and JSON-like values."""
    tensors = {f"{part}|{name}": getattr(target, part) for name, target in targets.items() for part in _PARTS}
    about = {name: {"losses": target.losses, "probability": target.probability} for name, target in targets.items()}
    return tensors, about


def unpack_targets(tensors: dict[str, Tensor], about: dict[str, Any], device: torch.device) -> dict[str, Target]:
    """Return the values that :func:`pack_targets` gave. Raises ``KeyError`` if something is missing."""
    found = {}
    for name, figures in about.items():
        origin, delta, before = (tensors[f"{part}|{name}"].to(device, copy=True) for part in _PARTS)
        found[name] = Target(origin, delta, tuple(figures["losses"]), figures["probability"], before)
    return found
