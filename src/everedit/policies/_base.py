"""What every policy is: a rule that turns the raw patch of one step into the change that the stream commits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from everedit.engine.state import State
from everedit.patch import Patch

__all__ = ["Policy", "PolicyConfig", "Step"]


@dataclass(frozen=True)
class Step:
    """One step of a stream as a policy sees it.

    ``patch`` is the method's raw change; ``keys(name)`` the inputs (d_in, n) of a weight's module on the edit,
    in the model that the method saw; ``shift(name)`` the stream's W_now - W_base (d_out, d_in), float64.
    """

    patch: Patch
    keys: Callable[[str], Tensor]
    shift: Callable[[str], Tensor]


class PolicyConfig(BaseModel):
    """Base of all configs: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Policy(ABC):
    """How the patches of a stream combine."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    needs: ClassVar[str] = "weights"
    Config: ClassVar[type[PolicyConfig]] = PolicyConfig

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config

    @property
    def edits_from(self) -> Literal["current", "base"]:
        """Which model the method sees: the one edited so far, or the unedited one, where edits are independent."""
        return "current"

    @abstractmethod
    def combine(self, step: Step, state: State) -> tuple[Patch, State]:
        """Return the change to add to the stream's weights, and the state after it."""

    @classmethod
    def traits(cls) -> dict[str, Any]:
        """Return the policy's traits as plain values."""
        return {"title": cls.title, "paper": cls.paper, "needs": cls.needs}
