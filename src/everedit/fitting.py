"""What a method and a policy need of each other before they work together on a model."""

from __future__ import annotations

from collections.abc import Sequence

from everedit.data import load_edits
from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.target import Target
from everedit.errors import EvereditError, NotApplicable
from everedit.methods import Method
from everedit.policies import Preparation, Stack

__all__ = ["pool", "preparation", "require_batches", "require_beneath", "require_fitting"]


def pool(name: str, path: str | None) -> Sequence[Edit]:
    """Return the edits of a data set, which a method or a policy measures something on."""
    return load_edits(name, path).edits


def require_fitting(method: Method | type[Method], policy: Stack) -> None:
    """Raise :class:`NotApplicable` if a policy works on something that the method does not have."""
    for part in policy.parts:
        if part.needs == "weights" and method.traits.changes != "weights":
            raise NotApplicable(
                what=f"the policy {part.name} combines changes of weights, and {method.name} changes the "
                f"{method.traits.changes}",
                fix="use the policy accumulate",
            )
        if part.needs == "values" and not method.traits.solves_values:
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


def require_beneath(policy: Stack) -> None:
    """Raise :class:`NotApplicable` if the model shows the stream's own weights under a policy."""
    if not policy.reads_out:
        raise NotApplicable(
            what=f"nothing is beneath the policy {policy.name}: what it shows is the stream",
            fix="leave beneath out, or choose a policy of the stage read-out (everedit policies ls)",
        )


def preparation(method: Method, bench: Workbench) -> Preparation:
    """Return what a policy may measure on the unedited model, with the edits that the method can make."""

    def solve(edits: Sequence[Edit]) -> list[Target]:
        return method.targets(bench, edits, [""])

    def fits(edit: Edit) -> bool:
        try:
            method.check_edit(bench, edit)
        except EvereditError:
            return False
        return True

    def fitting(name: str, path: str | None) -> Sequence[Edit]:
        return [edit for edit in bench.pool(name, path) if fits(edit)]

    known = bench.moments.provenance
    provenance = {part: known[part] for part in ("model", "tokenizer", "dtype")}
    provenance |= {"method": method.name, "settings": method.config.model_dump(mode="json")}
    return Preparation(fitting, solve, provenance)
