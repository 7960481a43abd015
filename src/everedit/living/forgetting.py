"""Taking edits out of the middle: by algebra where method and policy allow it, else by making the rest again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from everedit.editor import PREFETCH
from everedit.engine.downdate import Forgotten
from everedit.errors import LedgerError, NotApplicable, NumericalError
from everedit.ledger.reading import BASE
from everedit.ledger.records import CommitRecord, HeldEdit
from everedit.ledger.steps import keys_of, patch_of
from everedit.living.times import person
from everedit.living.writing import Writer
from everedit.outcome import Commit
from everedit.patch import LowRank, Patch

if TYPE_CHECKING:
    from everedit.living.model import LivingModel

__all__ = ["How", "forget", "named", "stage_forgetting"]

How = Literal["auto", "downdate", "replay"]


def named(living: LivingModel, name: str) -> list[HeldEdit]:
    """Return the edits that a commit's or an edit's id names.

    Raises :class:`LedgerError` if the model holds none of them.
    """
    record = living.ledger.commit(living.ledger.resolve(name)) if name != BASE else None
    chosen = [item for item in record.edits if item.row in living.ledger.held] if record else []
    if record and name != "head" and not record.id.startswith(name):
        chosen = [item for item in chosen if item.edit.id.startswith(name)]
    if not chosen:
        raise LedgerError(
            what=f"the model does not hold an edit of '{name}'", where=str(living.path), fix="see everedit log"
        )
    return chosen


def forget(living: LivingModel, items: Sequence[HeldEdit], how: How, by: str, why: str = "forgotten") -> CommitRecord:
    """Take edits out of the stream and commit that; return the commit, which says how it was done.

    Raises :class:`NotApplicable` if ``how`` is ``downdate`` and the algebra does not allow it.
    """
    writer = Writer(living)
    try:
        stage_forgetting(writer, items, how, by, why)
    except BaseException:
        writer.abandon()
        raise
    return writer.commit()[-1]


def stage_forgetting(writer: Writer, items: Sequence[HeldEdit], how: How, by: str, why: str = "forgotten") -> None:
    """Make the commits that take edits out, without writing them yet."""
    living = writer.living
    commits = [living.ledger.commit(name) for name in dict.fromkeys(item.commit for item in items)]
    rows = {item.row for item in items}
    about: dict[str, Any] = {"by": person(by), "why": why, "forgot": [item.edit.id for item in items]}
    last = len(commits) == 1 and commits[0].id == living.head
    if how != "replay" and not writer.drafts and (how == "downdate" or not last) and _whole(living, commits, rows):
        before = living.editor.state()
        try:
            if all(_downdate(writer, commit, about) for commit in commits):
                return
        except NumericalError:
            if how == "downdate":
                raise
        living.show(before, living.head)
        writer.drafts.clear()
    if how == "downdate":
        raise NotApplicable(
            what=f"{living.editor.method.name} under {living.editor.policy.name} cannot take this edit out by algebra",
            where=items[0].edit.prompt,
            fix="make what came later again: --how replay",
        )
    _replay(writer, items, about)


def _whole(living: LivingModel, commits: Sequence[CommitRecord], rows: set[int]) -> bool:
    """Whether every commit loses all of its edits: of some that were solved together one alone has no step."""
    return all({item.row for item in commit.edits} <= rows for commit in commits)


def _downdate(writer: Writer, commit: CommitRecord, about: dict[str, Any]) -> bool:
    """Take one commit out by algebra; False if there is none for it."""
    living = writer.living
    tensors, info = living.blobs.get(commit.draft.blob)
    patch = patch_of(tensors, info)
    keys = keys_of(tensors)
    # A second pass of the same commit knew the first, so that the two are no single step of the problem.
    if (
        not keys
        or "passes" in commit.draft.info
        or not all(isinstance(delta, LowRank) for delta in patch.deltas.values())
    ):
        return False
    forgotten = Forgotten(patch, keys, _Effects(living, commit.parent).of, living.editor.shift)
    start = living.editor.state()
    change = living.editor.forget(forgotten)
    if change is None:
        return False
    done = Commit((), change, change.norm(), None, {})
    rows = tuple(item.row for item in commit.edits)
    writer.stage_change("forget", start, done, info={**about, "how": "downdate"}, forgets=rows)
    return True


class _Effects:
    """What the stream's changes up to a commit make of keys, from their factors."""

    def __init__(self, living: LivingModel, head: str) -> None:
        self.living, self.head = living, head

    def of(self, name: str, keys: Tensor) -> Tensor:
        """Return the sum of all changes of a weight up to the commit, times ``keys`` (d_in, n), float64."""
        total = torch.zeros(len(self.living.editor.base_weight(name)), keys.shape[1], dtype=torch.float64)
        total = total.to(keys.device)
        for change in self._changes():
            if name in change.deltas:
                total += change.deltas[name].to(keys.device, torch.float64).apply(keys)
        return total

    def _changes(self) -> Iterator[Patch]:
        for _, draft in self.living.ledger.line(self.head):
            yield patch_of(*self.living.blobs.get(draft.blob))


def _replay(writer: Writer, items: Sequence[HeldEdit], about: dict[str, Any]) -> None:
    """Go back to where the first of the edits was made, and make everything after it again without them."""
    living, ledger = writer.living, writer.living.ledger
    old, names = living.head, {item.commit for item in items}
    line = [commit for commit, _ in ledger.line(old)]
    first = next(place for place, commit in enumerate(line) if commit in names)
    records = [ledger.commit(commit) for commit in line[first:]]
    living.show(living.replay.state(records[0].parent, (old, living.editor.state())), old)
    writer.parent = records[0].parent
    living.editor.prepare()
    gone = {item.row for item in items}
    kept = [[item.record for item in record.edits if item.row not in gone and item.row in ledger.held]
            for record in records]  # fmt: skip
    for place, (record, again) in enumerate(zip(records, kept, strict=True)):
        if record.draft.kind == "import":
            start = living.editor.state()
            change = patch_of(*living.blobs.get(record.draft.blob))
            living.editor.take(change)
            writer.stage_change("import", start, Commit((), change, change.norm(), None, {}), info=record.draft.info)
        elif again:
            ahead = [item.edit for later in kept[place + 1 : place + 1 + PREFETCH] for item in later]
            writer.stage_again(again, ahead, record)
    # A commit that changes nothing says what was done, and leads an undo back to where it was.
    start = living.editor.state()
    info = {**about, "how": "replay", "remade": sum(map(len, kept))}
    writer.stage_change("forget", start, Commit((), Patch({}), 0.0, None, {}), info=info, back=old)
