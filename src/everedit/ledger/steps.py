"""One step of a stream as the least that says it: factors of the weights' change, and how each tensor of state moved.

A tensor of the state is not written where it stayed. One that got rows, or other values in few places, is written as
those; a matrix that grew by a low-rank term as that term; any other one whole. Taken again in the same order the steps
give the same bits, on any machine: nothing in them is a matrix product.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from everedit.engine.state import Growth, State
from everedit.engine.weights import Snapshot, moved
from everedit.errors import LedgerError
from everedit.ledger.records import as_text
from everedit.outcome import StreamState
from everedit.patch import Delta, Dense, LowRank, Patch

__all__ = ["hashes_of", "keys_of", "patch_of", "step_between", "taken", "tensor_hash"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BAGS = ("method", "policy")
Parts = dict[str, Tensor]


def step_between(
    before: StreamState, after: StreamState, patch: Patch
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Return tensors and info that lead from one state to the next, and the hashes of what they change.

    ``patch`` is the change of the stream's weights between the two.
    """
    tensors: dict[str, Tensor] = {}
    info: dict[str, Any] = {"weights": {}, "method": {}, "policy": {}}
    touched: list[str] = []

    def put(bag: str, name: str, parts: Parts, how: dict[str, Any]) -> None:
        tensors.update({f"{bag}|{name}|{part}": tensor for part, tensor in parts.items()})
        info[bag][name] = how
        touched.append(f"{bag}|{name}")

    for name, delta in patch.deltas.items():
        put("weights", name, *_written(delta))
    for bag in _BAGS:
        old, new = getattr(before, bag), getattr(after, bag)
        for name, tensor in new.tensors.items():
            step = _change(old.tensors.get(name), tensor, new.grown.get(name))
            if step is not None:
                put(bag, name, *step)
        info[f"{bag}_gone"] = sorted(old.tensors.keys() - new.tensors.keys())
        info[f"{bag}_values"] = new.values
    present = hashes_of(after, [*touched, *(f"{bag}_values" for bag in _BAGS)])
    gone = {f"{bag}|{name}": "" for bag in _BAGS for name in info[f"{bag}_gone"]}
    return tensors, info, present | gone


def _written(delta: Delta) -> tuple[Parts, dict[str, Any]]:
    if isinstance(delta, LowRank):
        return delta.tensors(), {"how": "factors"}
    zeros = torch.zeros_like(delta.matrix)
    sparse = _places(zeros, delta.matrix)
    if sparse is not None:
        return sparse, {"how": "places", "shape": list(delta.matrix.shape)}
    return delta.tensors(), {"how": "whole"}


def _change(old: Tensor | None, new: Tensor, growth: Growth | None) -> tuple[Parts, dict[str, Any]] | None:
    """Return the parts that make ``new`` of ``old``, and how; None if nothing changed."""
    if old is new:
        return None
    if growth is not None:
        keys = {} if growth.keys is None else {"keys": growth.keys}
        if growth.before is not old or (old is None and growth.start is None):
            return {"whole": new, **keys}, {"how": "whole"}
        return {"factor": growth.factor, **keys}, {"how": "grown", "sign": growth.sign, "start": growth.start}
    if old is None or old.dtype != new.dtype or old.shape[1:] != new.shape[1:] or not 0 < old.dim() == new.dim():
        return {"whole": new}, {"how": "whole"}
    if len(new) < len(old):
        return {"whole": new}, {"how": "whole"}
    sparse = _places(old, new[: len(old)])
    if sparse is None:
        return {"whole": new}, {"how": "whole"}
    rows = new[len(old) :]
    if not len(rows) and not len(sparse["values"]):
        return None
    parts = {name: part for name, part in {**sparse, "rows": rows}.items() if len(part)}
    return parts, {"how": "edited"}


def _places(old: Tensor, new: Tensor) -> Parts | None:
    """Return where two tensors of one shape differ in their bits and what stands there, if that takes less room."""
    bits = _INTEGERS[new.element_size()]
    differs = (old.contiguous().view(bits) != new.contiguous().view(bits)).flatten()
    count = int(differs.sum())
    narrow = differs.numel() < 2**31
    if count and count * (new.element_size() + (4 if narrow else 8)) >= new.numel() * new.element_size():
        return None
    places = differs.nonzero()[:, 0]
    return {"places": places.int() if narrow else places, "values": new.flatten()[places]}


def taken(state: StreamState, tensors: Parts, info: dict[str, Any], weight: Callable[[str], Tensor]) -> StreamState:
    """Return the state after a step. ``weight`` gives a weight (d_out, d_in) of the base model.

    Raises :class:`LedgerError` if the step does not fit the state or the model.
    """
    grouped: dict[str, dict[str, Parts]] = {"weights": {}, "method": {}, "policy": {}}
    try:
        for key, tensor in tensors.items():
            bag, rest = key.split("|", 1)
            name, _, part = rest.rpartition("|")
            grouped[bag].setdefault(name, {})[part] = tensor
        masters = dict(state.weights.masters)
        for name, parts in grouped["weights"].items():
            now = masters[name] if name in masters else weight(name)
            delta = _delta(parts, info["weights"][name])
            if delta.shape != now.shape:
                raise ValueError(f"the change of '{name}' has shape {delta.shape}, the weight {tuple(now.shape)}")
            masters[name] = moved(now, delta)
        bags = {bag: _bag(getattr(state, bag), grouped[bag], info, bag) for bag in _BAGS}
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AssertionError) as error:
        raise LedgerError(
            what=f"a step of the ledger does not fit what came before it: {error}",
            fix="restore the folder from a copy",
        ) from error
    return StreamState(Snapshot(masters), bags["method"], bags["policy"], state.pending, state.made_by)


def patch_of(tensors: Parts, info: dict[str, Any]) -> Patch:
    """Return the change of the weights that a step holds."""
    grouped: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        bag, rest = key.split("|", 1)
        name, _, part = rest.rpartition("|")
        if bag == "weights":
            grouped.setdefault(name, {})[part] = tensor
    return Patch({name: _delta(parts, info["weights"][name]) for name, parts in grouped.items()})


def keys_of(tensors: Parts) -> dict[str, Tensor]:
    """Return what a step was solved for, by the names of the state's matrices that grew by it."""
    found: dict[str, Tensor] = {}
    for part in ("factor", "keys"):
        for key, tensor in tensors.items():
            bag, rest = key.split("|", 1)
            if bag in _BAGS and rest.endswith(f"|{part}"):
                found[rest.removesuffix(f"|{part}")] = tensor.clone()
    return found


def _delta(parts: Parts, how: dict[str, Any]) -> Delta:
    if how["how"] == "factors":
        left, right = parts["left"], parts["right"]
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[1]:
            raise ValueError("factors of a change do not fit each other")
        return LowRank(left.clone(), right.clone())
    if how["how"] == "places":
        zeros = parts["values"].new_zeros(math.prod(how["shape"]))
        return Dense(_replaced(zeros, parts).view(how["shape"]))
    return Dense(parts["matrix"].clone())


def _bag(state: State, steps: dict[str, Parts], info: dict[str, Any], bag: str) -> State:
    tensors = {name: tensor for name, tensor in state.tensors.items() if name not in info[f"{bag}_gone"]}
    for name, parts in steps.items():
        how, old = info[bag][name], state.tensors.get(name)
        if how["how"] == "grown":
            factor = parts["factor"].clone()
            if old is not None and tuple(old.shape) != (len(factor), len(factor)):
                raise ValueError(f"'{name}' cannot grow by a factor of shape {tuple(factor.shape)}")
            tensors[name] = Growth(factor, how["sign"], old, how["start"]).after()
        elif how["how"] == "edited":
            assert old is not None
            changed = _replaced(old.flatten(), parts).view(old.shape) if "places" in parts else old
            rows = [parts["rows"].to(old.device)] if "rows" in parts else []
            tensors[name] = torch.cat([changed, *rows])
        else:
            tensors[name] = parts["whole"].clone()
    return State(tensors, dict(info[f"{bag}_values"]))


def _replaced(flat: Tensor, parts: Parts) -> Tensor:
    fresh, places = flat.clone(), parts["places"].long().to(flat.device)
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(flat):
        raise ValueError("a place lies outside of its tensor")
    fresh[places] = parts["values"].to(flat.device)
    return fresh


def hashes_of(state: StreamState, names: list[str] | None = None) -> dict[str, str]:
    """Return the hashes of a state's tensors and values, all of them or those of ``names`` (bag|name)."""
    everything: dict[str, Tensor] = {f"weights|{name}": tensor for name, tensor in state.weights.masters.items()}
    for bag in _BAGS:
        everything |= {f"{bag}|{name}": tensor for name, tensor in getattr(state, bag).tensors.items()}
    values = {f"{bag}_values": getattr(state, bag).values for bag in _BAGS}
    wanted = [*everything, *values] if names is None else names
    return {name: tensor_hash(everything[name]) if name in everything else _value_hash(values[name]) for name in wanted}


def tensor_hash(tensor: Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and bits, 32 hexadecimal digits."""
    hasher = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    whole = tensor.detach().cpu().contiguous()
    hasher.update(whole.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:32]


def _value_hash(values: dict[str, Any]) -> str:
    return hashlib.sha256(as_text(values).encode()).hexdigest()[:32]
