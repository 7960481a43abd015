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

from everedit.engine.downdate import Forgotten
from everedit.engine.solve import Factor, recursive_step
from everedit.engine.state import Growing, State
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
        tensors, done = Growing(state.tensors), int(state.values.get("edits", 0)) + 1
        deltas: dict[str, Delta] = {}
        for name, raw in step.patch.deltas.items():
            keys = step.keys(name)
            gain = self._gain(name, keys, tensors, refresh=done % _REFRESH_EVERY == 0)
            keys = keys.double()
            effect = raw.to(torch.float64).apply(keys)
            if self.config.start == "base":
                effect = effect - step.shift(name) @ keys
            deltas[name] = LowRank(effect.contiguous(), gain.contiguous())
        values = {**state.values, "edits": done}
        return Patch(deltas, step.patch.info), State(dict(tensors), values, tensors.grown)

    def forget(self, forgotten: Forgotten, state: State) -> tuple[Patch, State] | None:
        """Take the step out of the regression: exact where every edit was made on the base model, and knew no other."""
        if self.config.start != "base":
            return None
        tensors = Growing(state.tensors)
        gains: dict[str, tuple[str, Tensor, Tensor]] = {}
        for matrix, keys in forgotten.keys.items():
            if not matrix.startswith("P|"):
                continue
            name, now = matrix.removeprefix("P|"), Factor.of(tensors[matrix].to(keys.device)).solve(keys)
            gains[name] = matrix, now, Factor.of(tensors.grow(matrix, keys, sign=-1)).solve(keys)
            if f"inverse|{name}" in tensors:
                _, root = recursive_step(tensors[f"inverse|{name}"].to(keys.device), keys, sign=-1)
                tensors.grow(f"inverse|{name}", root)
        values = {**state.values, "edits": int(state.values["edits"]) - 1}
        return Patch(forgotten.changes(gains)), State(dict(tensors), values, tensors.grown)

    def _gain(self, name: str, keys: Tensor, tensors: Growing, refresh: bool) -> Tensor:
        """Add the keys to P and return P^-1 K (D, n)."""
        gram = tensors.grow(f"P|{name}", keys, start=self.config.lam)
        if self.config.solver == "cholesky":
            return Factor.of(gram).solve(keys)
        eye = torch.eye(len(keys), dtype=torch.float64, device=keys.device)
        inverse = f"inverse|{name}"
        gain, root = recursive_step(tensors.get(inverse, eye / self.config.lam).to(keys.device), keys)
        tensors.grow(inverse, root, sign=-1, start=1 / self.config.lam)
        if refresh:
            # Woodbury's errors add up; the inverse is made anew from P now and then.
            fresh = Factor.of(gram).solve(eye)
            tensors[inverse] = (fresh + fresh.T) / 2
            del tensors.grown[inverse]
        return gain


POLICY = Simie
