"""Which methods and policies go together: known from their traits, before any model is loaded."""

from __future__ import annotations

from everedit.errors import NotApplicable
from everedit.methods import Method
from everedit.policies import Stack

__all__ = ["require_batches", "require_fitting"]


def require_fitting(method: Method | type[Method], policy: Stack) -> None:
    """Raise :class:`NotApplicable` if a policy of the stack works on something that the method does not have."""
    traits = method.traits
    for part in policy.parts:
        if part.needs == "weights" and traits.changes != "weights":
            raise NotApplicable(
                what=f"the policy {part.name} combines changes of weights, and {method.name} changes the "
                f"{traits.changes}",
                fix="use the policy accumulate",
            )
        if part.needs == "values" and not traits.solves_values:
            raise NotApplicable(
                what=f"the policy {part.name} works on solved values, and {method.name} solves for none",
                fix="use it with a method whose traits say solves_values (everedit methods ls)",
            )


def require_batches(method: Method | type[Method], batch: int) -> None:
    """Raise :class:`NotApplicable` for a batch of more than one if the method makes one edit at a time."""
    if batch > 1 and not method.traits.solves_batches:
        raise NotApplicable(
            what=f"{method.name} makes one edit at a time, and batches of {batch} are asked for",
            fix="leave the batch at 1, or choose a method whose traits say solves_batches (everedit methods ls)",
        )
