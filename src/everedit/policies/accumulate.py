"""Accumulation: W_t = W_{t-1} + Delta_t, each edit made on the model as the last one left it."""

from __future__ import annotations

from everedit.engine.state import State
from everedit.patch import Patch
from everedit.policies._base import Policy, Step


class Accumulate(Policy):
    """Adds every change as it comes."""

    name = "accumulate"
    title = "plain accumulation"
    needs = ""

    def combine(self, step: Step, state: State) -> tuple[Patch, State]:
        """Return the patch itself."""
        return step.patch, state


POLICY = Accumulate
