"""What every policy is: a rule about how the patches of a stream come about and combine, at one of four stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.downdate import Forgotten
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.patch import Patch

__all__ = ["STAGES", "Policy", "PolicyConfig", "Preparation", "Stage", "Step"]

Stage = Literal["values", "patch", "stream", "read-out"]
STAGES: tuple[Stage, ...] = ("values", "patch", "stream", "read-out")
"""In the order in which a step passes them; a stack of policies has at most one at each."""


@dataclass(frozen=True)
class Preparation:
    """What a policy may measure on the unedited model before the first edit.

    ``pool()`` gives edits of a data set that has nothing to do with the stream, or of a file; ``solve`` optimises
    values for some of them behind the bare prompt; ``provenance`` is all that the outcome depends on.
    """

    pool: Callable[[str, str | None], Sequence[Edit]]
    solve: Callable[[Sequence[Edit]], list[Target]]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of a stream as a policy sees it.

    ``patch`` is the method's change; ``keys(name)`` the inputs (d_in, n) of a weight's module on the edit, in the
    model that the method saw; ``shift(name)`` the stream's W_now - W_base (d_out, d_in), float64; ``weight(name)`` the
    weight (d_out, d_in) that the method saw, in float32.
    """

    patch: Patch
    keys: Callable[[str], Tensor]
    shift: Callable[[str], Tensor]
    weight: Callable[[str], Tensor]


class PolicyConfig(BaseModel):
    """Base of all configs: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Policy:
    """A rule at one stage of a stream; a subclass overrides what belongs to its stage."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    stage: ClassVar[Stage] = "stream"
    needs: ClassVar[str] = "weights"
    Config: ClassVar[type[PolicyConfig]] = PolicyConfig

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config

    @property
    def edits_from(self) -> Literal["current", "base"]:
        """Which model the method sees: the one edited so far, or the unedited one, where edits are independent."""
        return "current"

    def prepare(self, preparation: Preparation) -> None:
        """Measure what is needed on the unedited model; called before the first edit."""

    def adjust(self, targets: Sequence[Target], state: State) -> tuple[list[Target], State]:
        """Stage ``values``: return what the method shall write instead of ``targets``."""
        return list(targets), state

    def filter(self, step: Step) -> Patch:
        """Stage ``patch``: return what is let through of the method's change."""
        return step.patch

    def combine(self, step: Step, state: State) -> tuple[Patch, State]:
        """Stage ``stream``: return the change to add to the stream's weights, and the state after it."""
        return step.patch, state

    def forget(self, forgotten: Forgotten, state: State) -> tuple[Patch, State] | None:
        """Stage ``stream``: return the change that takes one step out of the stream, so that it is as if that had never
        been made, and the state without it; None if that cannot be had, and what came later must be made again.
        """
        return None

    def read_out(self, base: Tensor, shift: Tensor) -> Tensor:
        """Stage ``read-out``: return the change of ``base`` (d_out, d_in) that the model shows instead of the stream's
        own ``shift``; both float64. The stream itself goes on from ``shift``.
        """
        return shift

    @classmethod
    def traits(cls) -> dict[str, Any]:
        """Return the policy's traits as plain values."""
        return {"title": cls.title, "paper": cls.paper, "stage": cls.stage, "needs": cls.needs}
