"""What a stream still holds: every edit scored on the present model, how long edits live, and what ended them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from everedit.gates import held_by
from everedit.ledger.records import HeldEdit

if TYPE_CHECKING:
    from everedit.living.model import LivingModel

__all__ = ["Fate", "Retention", "retention", "survival"]

_AT_ONCE = 64


@dataclass(frozen=True)
class Fate:
    """What became of an edit: whether the model still says its target, how many commits it has lived through, and, if
    it was lost, the ``broken_by`` commit after which it no longer was there; its own if it never took.
    """

    item: HeldEdit
    number: int
    held: bool
    lived: int
    broken_by: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        edit = self.item.edit
        return {
            "edit": edit.id, "commit": self.item.commit, "number": self.number, "prompt": edit.prompt,
            "target_new": edit.target_new, "held": self.held, "lived": self.lived, "broken_by": self.broken_by or None,
        }  # fmt: skip


@dataclass(frozen=True)
class Retention:
    """The fates of all edits that are in the ledger, and the survival curve: (commits lived through, share alive).

    Without blame there is no curve if an edit was lost.
    """

    fates: tuple[Fate, ...]
    curve: tuple[tuple[int, float], ...]

    @property
    def share(self) -> float:
        """The share of edits that the model still holds."""
        return sum(fate.held for fate in self.fates) / len(self.fates) if self.fates else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        fates = [fate.as_dict() for fate in self.fates]
        return {"edits": len(fates), "held": self.share, "curve": [list(point) for point in self.curve], "fates": fates}


def retention(living: LivingModel, *, blame: bool) -> Retention:
    """Return what the present model holds; with ``blame`` also which commit broke what it lost."""
    fates: list[Fate] = []
    line = [commit for commit, _ in living.ledger.line(living.head)]
    numbers = {commit: number for number, commit in enumerate(line, start=1)}
    every = iter(living.ledger.held)
    while part := list(islice(every, _AT_ONCE)):
        said = held_by(living.lm, [item.edit for item in part])
        for item, held in zip(part, said, strict=True):
            number = numbers[item.commit]
            fates.append(Fate(item, number, held, len(line) - number))
    if blame and not all(fate.held for fate in fates):
        broken = _bisected(living, line, [fate for fate in fates if not fate.held])
        fates = [broken.get(fate.item.row, fate) for fate in fates]
    # Without blame it is not known when what was lost was lost.
    known = blame or all(fate.held for fate in fates)
    return Retention(tuple(fates), survival([(fate.lived, not fate.held) for fate in fates]) if known else ())


def _bisected(living: LivingModel, line: Sequence[str], lost: Sequence[Fate]) -> dict[int, Fate]:
    """Return the fates of lost edits with what broke them, found by halving the commits in question.

    An edit that was lost, came back and was lost again has several such commits; one of them is named.
    """
    head, present = living.head, living.editor.state()
    known = ("", living.replay.base())
    # The last number at which an edit is known to be held, and the first at which it is known not to be.
    bounds = {fate.item.row: [fate.number - 1, len(line)] for fate in lost}
    fates = {fate.item.row: fate for fate in lost}
    asked = {row: fate.number for row, fate in fates.items()}
    try:
        while asked:
            at: dict[int, list[int]] = defaultdict(list)
            for row, number in asked.items():
                at[number].append(row)
            for number in sorted(at):
                state = living.replay.state(line[number - 1], known)
                living.show(state, line[number - 1])
                known = (line[number - 1], state)
                said = held_by(living.lm, [fates[row].item.edit for row in at[number]])
                for row, held in zip(at[number], said, strict=True):
                    bounds[row][0 if held else 1] = number
            asked = {row: (low + high) // 2 for row, (low, high) in bounds.items() if high - low > 1}
            known = ("", living.replay.base())
    finally:
        living.show(present, head)
    return {
        row: Fate(fate.item, fate.number, False, bounds[row][1] - fate.number, line[bounds[row][1] - 1])
        for row, fate in fates.items()
    }


def survival(lives: Sequence[tuple[int, bool]]) -> tuple[tuple[int, float], ...]:
    """Return the Kaplan-Meier estimate of the share alive after so many commits.

    ``lives`` are (commits lived through, whether that was the end): of an edit that is still held it is not known how
    long it will live, only how long it has.
    """
    ended, seen = Counter(length for length, over in lives if over), Counter(length for length, _ in lives)
    alive, at_risk, curve = 1.0, len(lives), [(0, 1.0)]
    for length in sorted(seen):
        alive *= 1 - ended[length] / at_risk
        at_risk -= seen[length]
        curve.append((length, alive))
    return tuple(curve)
