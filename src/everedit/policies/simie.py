"""SimIE: W_t = W_{t-1} + ((W_0 + Delta_t) - W_{t-1}) K_t K_t^T P_t^-1 with P_t = P_{t-1} + K_t K_t^T, P_0 = lambda I.

Guo et al., "Towards Lifelong Model Editing via Simulating Ideal Editor", ICML 2025: the smallest shift that has,
on every edit's keys, the effect of that edit alone, as a recursive ridge regression. With ``start="base"`` the
method edits the untouched model each time and the recursion is exact; with ``start="current"`` (the paper's
equation 5 and the default of its code) the bracket is the change found on the model as it stands.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.engine.solve import Factor, recursive_gain
from everedit.engine.state import State
from everedit.patch import Delta, LowRank, Patch
from everedit.policies._base import Policy, PolicyConfig, Step

_REFRESH_EVERY = 100


class SimieConfig(PolicyConfig):
    """Settings of SimIE."""

    lam: float = Field(1.0, gt=0, description="lambda, the ridge; its natural unit is a key's squared norm")
    start: Literal["current", "base"] = Field("current", description="the model that each edit is made on")
    solver: Literal["cholesky", "woodbury"] = Field(
        "cholesky", description="solve with P each time, or carry its inverse and refresh it every 100 edits"
    )


class Simie(Policy):
    """Keeps earlier edits' effects by regression on their keys."""

    name = "simie"
    title = "SimIE, simulating the ideal editor"
    paper = "ICML 2025, OpenReview VdEG08ZJCH"
    Config = SimieConfig
    config: SimieConfig

    @property
    def edits_from(self) -> Literal["current", "base"]:
        """As configured."""
        return self.config.start

    def combine(self, step: Step, state: State) -> tuple[Patch, State]:
        """Return the regression's change as low-rank factors, and P with this edit's keys in it."""
        tensors, done = dict(state.tensors), int(state.values.get("edits", 0)) + 1
        deltas: dict[str, Delta] = {}
        for name, raw in step.patch.deltas.items():
            keys = step.keys(name).double()
            gain = self._gain(name, keys, tensors, refresh=done % _REFRESH_EVERY == 0)
            effect = raw.to(torch.float64).apply(keys)
            if self.config.start == "base":
                effect = effect - step.shift(name) @ keys
            deltas[name] = LowRank(effect, gain)
        return Patch(deltas, step.patch.info), State(tensors, {**state.values, "edits": done})

    def _gain(self, name: str, keys: Tensor, tensors: dict[str, Tensor], refresh: bool) -> Tensor:
        """Add the keys to P and return P^-1 K (D, n)."""
        eye = torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
        gram = tensors.get(f"P|{name}", eye * self.config.lam).to(keys.device) + keys @ keys.T
        tensors[f"P|{name}"] = gram
        if self.config.solver == "cholesky":
            return Factor.of(gram).solve(keys)
        inverse = tensors.get(f"inverse|{name}", eye / self.config.lam).to(keys.device)
        gain, inverse = recursive_gain(inverse, keys)
        # Woodbury's errors add up; the inverse is made anew from P now and then.
        tensors[f"inverse|{name}"] = Factor.of(gram).solve(eye) if refresh else inverse
        return gain


POLICY = Simie
