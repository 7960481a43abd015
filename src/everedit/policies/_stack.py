"""Several policies at once, each at its stage: ``nas+simie+prune``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from everedit.engine.downdate import Forgotten
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import NotApplicable
from everedit.patch import Patch
from everedit.policies._base import STAGES, Policy, Preparation, Step

__all__ = ["Stack"]


class Stack:
    """Policies in the order of their stages, and what they are together.

    Raises :class:`NotApplicable` if two of them want the same stage.
    """

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.parts = sorted(policies, key=lambda policy: STAGES.index(policy.stage))
        for one, other in zip(self.parts, self.parts[1:], strict=False):
            if one.stage == other.stage:
                raise NotApplicable(
                    what=f"the policies {one.name} and {other.name} both decide about a stream's {one.stage}",
                    fix="choose one of them; policies with different stages can be combined (everedit policies ls)",
                )

    @property
    def name(self) -> str:
        """The names, joined by ``+``."""
        return "+".join(policy.name for policy in self.parts)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as plain values: of a single policy as they are, of several by name."""
        dumped = {policy.name: policy.config.model_dump(mode="json") for policy in self.parts}
        return dumped[self.name] if len(self.parts) == 1 else dumped

    def beneath(self) -> Stack:
        """Return what is left without the policy of read-out: how the stream goes on."""
        return Stack([policy for policy in self.parts if policy.stage != "read-out"])

    @property
    def edits_from(self) -> Literal["current", "base"]:
        """The unedited model if any of them says so."""
        return "base" if any(policy.edits_from == "base" for policy in self.parts) else "current"

    @property
    def reads_keys(self) -> bool:
        """Whether a policy other than plain accumulation combines the changes."""
        return any(policy.stage == "stream" and policy.name != "accumulate" for policy in self.parts)

    @property
    def reads_out(self) -> bool:
        """Whether the model shows something else than the stream's own weights."""
        return any(policy.stage == "read-out" for policy in self.parts)

    def prepare(self, preparation: Preparation) -> None:
        """See :meth:`Policy.prepare`."""
        for policy in self.parts:
            policy.prepare(preparation)

    def adjust(self, targets: Sequence[Target], state: State) -> tuple[list[Target], State]:
        """See :meth:`Policy.adjust`."""
        chosen = list(targets)
        for policy in self.parts:
            chosen, state = policy.adjust(chosen, state)
        return chosen, state

    def combine(self, step: Step, state: State) -> tuple[Patch, State]:
        """Filter the change, then combine it with the stream."""
        for policy in self.parts:
            step = Step(policy.filter(step), step.keys, step.shift, step.weight)
        patch = step.patch
        for policy in self.parts:
            if policy.stage == "stream":
                patch, state = policy.combine(step, state)
        return patch, state

    def forget(self, forgotten: Forgotten, state: State) -> tuple[Patch, State] | None:
        """See :meth:`Policy.forget`; it is for the policy of the stream to say."""
        streams = [policy for policy in self.parts if policy.stage == "stream"]
        return streams[0].forget(forgotten, state) if streams else None

    @property
    def only_adds(self) -> bool:
        """Whether the stream is the plain sum of what the method made."""
        return all(policy.stage in ("values", "read-out") or policy.name == "accumulate" for policy in self.parts)

    def read_out(self, base: Tensor, shift: Tensor) -> Tensor:
        """See :meth:`Policy.read_out`."""
        for policy in self.parts:
            shift = policy.read_out(base, shift)
        return shift
