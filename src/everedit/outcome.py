"""What an editor gives back: answers side by side, commits, results with scores, and the state of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from everedit.edit import Edit
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.engine.weights import Snapshot
from everedit.evaluation import EditScores
from everedit.patch import Patch

__all__ = ["Answer", "Commit", "EditResult", "StreamState"]


@dataclass(frozen=True)
class Answer:
    """What the unedited and the edited model say to one prompt."""

    prompt: str
    base: str
    edited: str

    def __str__(self) -> str:
        """The first line of each, which is where an answer stands."""
        base, edited = (text.strip().partition("\n")[0] for text in (self.base, self.edited))
        return f"{self.prompt}\n  base:   {base}\n  edited: {edited}"


@dataclass(frozen=True)
class Commit:
    """One step of the stream: the edits made, the change committed, and what it took."""

    edits: tuple[Edit, ...]
    patch: Patch
    norm: float
    target_probability: float | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class EditResult:
    """What :meth:`Editor.edit` did: commits, and each edit's scores before and after, by protocol and metric."""

    commits: list[Commit]
    before: list[EditScores] = field(default_factory=list)
    after: list[EditScores] = field(default_factory=list)

    @property
    def norm(self) -> float:
        """Frobenius norm of the last change."""
        return self.commits[-1].norm


@dataclass(frozen=True)
class StreamState:
    """All that a stream is at one moment; saved and loaded, it goes on as if nothing had happened.

    ``made_by`` names method, policy and base model; a state without it is that of a stream that has not begun.
    """

    weights: Snapshot
    method: State
    policy: State
    pending: dict[str, Target]
    made_by: dict[str, str] = field(default_factory=dict)
