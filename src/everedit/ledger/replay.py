"""How a state is made again from the ledger: from the nearest snapshot, or from the base model, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.engine.state import State
from everedit.engine.weights import Snapshot
from everedit.errors import LedgerError
from everedit.ledger.blobs import Blobs
from everedit.ledger.records import Draft
from everedit.ledger.steps import hashes_of, taken
from everedit.ledger.store import Ledger
from everedit.ledger.stream import pack, unpack
from everedit.outcome import StreamState

__all__ = ["Replay"]

_STEPS_APART = 256
_BYTES_APART = 64 << 20


@dataclass
class Replay:
    """Makes states of a ledger. ``weight`` gives a weight (d_out, d_in) of the base model in float32.

    Snapshots only save time: without them every state is made from the base model.
    """

    ledger: Ledger
    blobs: Blobs
    weight: Callable[[str], Tensor]
    device: torch.device
    made_by: dict[str, str]

    def base(self) -> StreamState:
        """Return the state before the first edit."""
        return StreamState(Snapshot({}), State(), State(), {}, self.made_by)

    def state(self, head: str, known: tuple[str, StreamState] | None = None) -> StreamState:
        """Return the state at ``head``, checked to the bit against what the ledger says of it.

        ``known`` is a commit whose state is at hand. Raises :class:`LedgerError` if the ledger is damaged.
        """
        expected = self.ledger.hashes(head)
        start, state = self._nearest(head, known)
        for _, draft in self.ledger.line(head, after=start):
            state = self.step(state, draft)
        self._require(state, expected, head)
        return state

    def step(self, state: StreamState, draft: Draft) -> StreamState:
        """Return the state after a commit."""
        return taken(state, *self.blobs.get(draft.blob), self._fitting_weight)

    def _fitting_weight(self, name: str) -> Tensor:
        try:
            return self.weight(name)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"the model has no weight '{name[:120]}'") from error

    def _require(self, state: StreamState, expected: dict[str, str], head: str) -> None:
        found = hashes_of(state)
        odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        # The base model has no record.
        if head and odd:
            raise LedgerError(
                what=f"the model made from the ledger is not the one that was committed: {', '.join(odd)[:300]}",
                where=f"{self.ledger.folder}, commit {head[:12]}",
                fix="restore the folder from a copy; everedit verify names the first commit that differs",
            )

    def _nearest(self, head: str, known: tuple[str, StreamState] | None) -> tuple[str, StreamState]:
        """Return the last commit on the line of ``head`` whose state can be had at once."""
        best: tuple[int, str, str] = (0, "", "")
        for commit, number, blob, _ in self.ledger.snapshots():
            # A writer may just have let go of it.
            if number > best[0] and self.blobs.has(blob) and self.ledger.on_line(commit, head):
                best = (number, commit, blob)
        if known is not None and self.ledger.on_line(known[0], head):
            number = self.ledger.commit(known[0]).number if known[0] else 0
            if number >= best[0]:
                return known
        if not best[1]:
            return "", self.base()
        return best[1], self._snapshot(best[2])

    def _snapshot(self, blob: str) -> StreamState:
        tensors, info = self.blobs.get(blob)
        try:
            state = unpack(tensors, {**info, "pending": {}}, self.device)
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(
                what=f"a snapshot is damaged: {error!r}", where=str(self.ledger.folder), fix="restore a copy"
            ) from error
        return StreamState(state.weights, state.method, state.policy, {}, self.made_by)

    def snapshot_if_due(self, head: str, state: StreamState) -> None:
        """Keep a snapshot of ``head`` if the way from the last one has become long, and let go of those in excess."""
        number = self.ledger.commit(head).number
        kept = [item for item in self.ledger.snapshots() if item[1] <= number and self.ledger.on_line(item[0], head)]
        last, size = (kept[-1][1], kept[-1][3]) if kept else (0, 0)
        far = number - last >= _STEPS_APART
        if not far and self.ledger.size_since(last) < max(_BYTES_APART, size):
            return
        self.keep_snapshot(head, state)

    def keep_snapshot(self, head: str, state: StreamState) -> None:
        """Keep a snapshot of ``head``; of the older ones stay fewer, the further back they lie."""
        before = self.ledger.snapshots()
        tensors, info = pack(StreamState(state.weights, state.method, state.policy, {}, state.made_by))
        blob, size = self.blobs.put(tensors, info)
        number = self.ledger.commit(head).number
        after, distance = [(head, number, blob, size)], 0
        for item in sorted((item for item in before if item[0] != head), key=lambda item: -item[1]):
            if number - item[1] >= 2 * distance and item[1] < number:
                after.append(item)
                distance = number - item[1]
        self.ledger.keep_snapshots(after)
        stay = {item[2] for item in after}
        for item in before:
            if item[2] not in stay:
                self.blobs.drop(item[2])

    def verified(self, head: str) -> Iterator[tuple[str, int]]:
        """Make every state up to ``head`` again from the base model, without snapshots, and compare all hashes.

        Yields each commit's id and number when it is found right. Raises :class:`LedgerError` at the first that is not.
        """
        state, number, expected = self.base(), 0, dict[str, str]()
        for commit, draft in self.ledger.line(head):
            state, number = self.step(state, draft), number + 1
            found = hashes_of(state, [name for name, value in draft.hashes.items() if value])
            odd = sorted(name for name in found if found[name] != draft.hashes[name])
            if odd:
                raise LedgerError(
                    what=f"commit {commit[:12]} gives other bits than were committed: {', '.join(odd)[:300]}",
                    where=str(self.ledger.folder),
                    fix="restore the folder from a copy",
                )
            expected.update(draft.hashes)
            yield commit, number
        self._require(state, {name: value for name, value in expected.items() if value}, head)
