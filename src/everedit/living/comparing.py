"""Two commits side by side, and every commit against what its hashes say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from everedit.errors import LedgerError
from everedit.ledger.records import HeldEdit
from everedit.ledger.steps import hashes_of
from everedit.outcome import StreamState

if TYPE_CHECKING:
    from everedit.living.model import LivingModel

__all__ = ["Diff", "diff", "verify"]


@dataclass(frozen=True)
class Diff:
    """What differs from ``one`` to ``other``: edits that only one of them holds, the Frobenius norm of each weight's
    difference (also as a share of the unedited weight's), and the names of state tensors that differ.
    """

    one: str
    other: str
    removed: tuple[HeldEdit, ...]
    added: tuple[HeldEdit, ...]
    weights: dict[str, tuple[float, float]]
    state: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        edits = {
            name: [{"id": item.edit.id, "commit": item.commit, **item.record.as_dict()} for item in items]
            for name, items in (("removed", self.removed), ("added", self.added))
        }
        weights = {name: {"norm": norm, "relative": share} for name, (norm, share) in self.weights.items()}
        return {"from": self.one or "base", "to": self.other or "base", **edits, "weights": weights,
                "state": list(self.state)}  # fmt: skip


def diff(living: LivingModel, one: str, other: str) -> Diff:
    """Return what differs between two commits; "" is the base model."""
    left, right = _edits(living, one), _edits(living, other)
    first = living.replay.state(one, (living.head, living.editor.state()))
    second = living.replay.state(other, (one, first))
    hashes = [{name: value for name, value in hashes_of(state).items() if "|" in name} for state in (first, second)]
    names = {name for name in hashes[0].keys() | hashes[1].keys() if hashes[0].get(name) != hashes[1].get(name)}
    return Diff(
        one,
        other,
        tuple(item for name, item in left.items() if name not in right),
        tuple(item for name, item in right.items() if name not in left),
        {name: _norms(living, name, first, second) for name in _weights(names)},
        tuple(sorted(name.replace("|", " ", 1) for name in names if not name.startswith("weights|"))),
    )


def _edits(living: LivingModel, head: str) -> dict[str, HeldEdit]:
    """Return the edits that a commit holds, by id."""
    commits = [living.ledger.commit(commit) for commit, _ in living.ledger.line(head)]
    forgotten = {row for commit in commits for row in commit.draft.forgets}
    items = [item for commit in commits for item in commit.edits if item.row not in forgotten]
    return {item.edit.id: item for item in items}


def _weights(names: set[str]) -> list[str]:
    return sorted(name.removeprefix("weights|") for name in names if name.startswith("weights|"))


def _norms(living: LivingModel, name: str, first: StreamState, second: StreamState) -> tuple[float, float]:
    base = living.editor.base_weight(name)
    one, other = (state.weights.masters.get(name, base).double() for state in (first, second))
    norm = float(torch.linalg.matrix_norm(other - one))
    return norm, norm / float(base.double().norm())


def verify(living: LivingModel, progress: Callable[[int], object]) -> int:
    """Make every state again and compare; return how many commits there are."""
    count = 0
    for _, count in living.replay.verified(living.head):
        progress(count)
    # Every file that any line speaks of must be sound, not only those of the present one.
    for blob in living.ledger.blobs_in_use():
        living.blobs.get(blob)
    # If another process is writing, or this one may not, what is left over stays for another time.
    with suppress(LedgerError), living.lock.held():
        _collect(living)
    return count


def _collect(living: LivingModel) -> None:
    """Remove the files of commits that were never made, since the process that was making them was killed."""
    used = living.ledger.blobs_in_use()
    for blob in living.blobs.names():
        if blob not in used:
            living.blobs.drop(blob)
