"""Taking edits out of the middle: by algebra where method and policy allow it, else by making the rest again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from everedit.editor import PREFETCH
from everedit.engine.downdate import Forgotten
from everedit.errors import LedgerError, NotApplicable, NumericalError
from everedit.ledger.reading import BASE
from everedit.ledger.records import CommitRecord, Draft, HeldEdit
from everedit.ledger.steps import keys_of, patch_of
from everedit.living.times import person
from everedit.living.writing import Writer
from everedit.outcome import Commit, StreamState
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
    # Of edits that were solved together one alone is no step that could be taken out.
    whole = all({item.row for item in commit.edits} <= rows for commit in commits)
    if whole and (how == "downdate" or (how == "auto" and not last)):
        try:
            if _downdate(writer, sorted(commits, key=lambda commit: commit.number), about):
                return
        except NumericalError:
            if how == "downdate":
                raise
    if how == "downdate":
        raise NotApplicable(
            what=f"{living.editor.method.name} under {living.editor.policy.name} cannot take this edit out by algebra",
            where=items[0].edit.prompt,
            fix="make what came later again: --how replay",
        )
    _replay(writer, items, about)


def _downdate(writer: Writer, commits: Sequence[CommitRecord], about: dict[str, Any]) -> bool:
    """Take commits out by algebra, together; False, and nothing is changed, if there is none for it."""
    living = writer.living
    found = [keys_of(living.blobs.get(commit.draft.blob)[0]) for commit in commits]
    keys = {matrix: torch.cat([each[matrix] for each in found], 1) for matrix in found[0]}
    line = list(living.ledger.line(living.head))
    # A smaller step, a second pass that knew the first, and a change from elsewhere are no steps of the problem.
    odd = any(draft.kind == "import" or {"scale", "passes"} & draft.info.keys() for _, draft in line)
    if not keys or odd or writer.drafts:
        return False
    start = living.editor.state()
    change = living.editor.forget(Forgotten(keys, _Line(living, line, {commit.id for commit in commits}).missed))
    if change is None:
        return False
    done = Commit((), change, change.norm(), None, {})
    rows = tuple(item.row for commit in commits for item in commit.edits)
    writer.stage_change("forget", start, done, info={**about, "how": "downdate"}, forgets=rows)
    return True


@dataclass(frozen=True)
class _Line:
    """The steps of a stream, taken once more to learn the effect that each was to have."""

    living: LivingModel
    line: Sequence[tuple[str, Draft]]
    commits: set[str]

    def missed(self, gains: Mapping[str, tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return S K - E (d_out, n) of the commits by weight; see :class:`Forgotten`."""
        living = self.living
        gone = {row for _, draft in self.line for row in draft.forgets}
        sums: dict[str, Tensor] = {}
        own: dict[str, list[Tensor]] = {name: [] for name in gains}
        state = living.replay.base()
        for commit, draft in self.line:
            tensors, info = living.blobs.get(draft.blob)
            if draft.kind == "edit" and not gone & {item.row for item in living.ledger.commit(commit).edits}:
                patch, keys = patch_of(tensors, info), keys_of(tensors)
                for name, (matrix, gain) in gains.items():
                    effect = self._effect(state, patch, name, keys[matrix].to(gain))
                    sums[name] = sums.get(name, 0) + effect @ (keys[matrix].to(gain).T @ gain)
                    if commit in self.commits:
                        own[name].append(effect)
            state = living.replay.step(state, draft)
        return {name: total - torch.cat(own[name], 1) for name, total in sums.items()}

    def _effect(self, state: StreamState, patch: Patch, name: str, keys: Tensor) -> Tensor:
        """Return what the stream's shift of a weight was to make of a step's keys (d_in, n)."""
        delta, base = patch.deltas[name], self.living.editor.base_weight(name)
        assert isinstance(delta, LowRank)
        before = state.weights.masters.get(name, base).double() - base.double()
        return delta.left.to(keys) + before.to(keys) @ keys


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
