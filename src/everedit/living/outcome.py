"""What adding edits to a living model gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from everedit.conflicts import Conflict
from everedit.edit import Edit
from everedit.ledger.records import CommitRecord

__all__ = ["Added", "SetAside"]

Why = Literal["refused", "conflict", "cannot be made", "known already", "held already", "bad record"]


@dataclass(frozen=True)
class SetAside:
    """An edit, or a record of a file, that was not made: why, and what to do. ``line`` is that of its file."""

    why: Why
    reason: str
    fix: str
    edit: Edit | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    line: int | None = None
    record: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        found = {"why": self.why, "reason": self.reason, "fix": self.fix, "figures": self.figures, "line": self.line}
        record = self.edit.model_dump(mode="json", exclude_defaults=True) if self.edit else self.record
        return {**found, "edit": self.edit.id if self.edit else "", "record": record}


@dataclass
class Added:
    """The commits that were made, what was set aside, and the conflicts with which edits were made all the same."""

    commits: list[CommitRecord] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    conflicts: list[Conflict] = field(default_factory=list)
    stopped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "commits": [commit.as_dict() for commit in self.commits],
            "set_aside": [item.as_dict() for item in self.set_aside],
            "conflicts": [conflict.as_dict() for conflict in self.conflicts],
            "stopped": self.stopped,
        }
