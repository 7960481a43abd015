"""RLSEdit: W_t = argmin sum_i ||W K_i - V_i||^2 + lam^2 ||W - W_0||^2 + mu^2 w tr((W - W_0) C (W - W_0)^T).

Wang et al., "Beyond Hard Writes and Rigid Preservation: Soft Recursive Least-Squares for Lifelong LLM Editing",
arXiv 2601.15686, solved recursively. With M_0 = (lam^2 I + mu^2 w C)^-1 each batch takes G = M K (I + K^T M K)^-1,
the change R G^T and M <- M - G K^T M, which is the minimiser over all batches so far. V is what the layer gives now
plus its share R of what is missing; the released code takes the residual itself for V and forgets M between batches,
which is neither the objective nor recursive (rlsedit.md).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from everedit.engine.bench import Workbench
from everedit.engine.downdate import Forgotten
from everedit.engine.solve import Factor, recursive_step
from everedit.engine.state import Growing, State
from everedit.methods._base import Traits
from everedit.methods._spread import RidgeConfig, SpreadMethod, later_target, taken_out
from everedit.patch import LowRank, Patch


class RlsEditConfig(RidgeConfig):
    """Settings of RLSEdit; None means the published value for the family."""

    lam: float = Field(0.0, ge=0, description="lambda: weight of staying near the original matrix; enters squared")
    mu: float = Field(1.0, ge=0, description="mu: weight of staying near the original mapping; enters squared")

    def published_target(self, family: str) -> dict[str, float]:
        """Return the released settings."""
        return later_target(family)

    def published_weight(self, family: str) -> float:
        """Return omega, the weight of the second moments."""
        return 20_000.0 if family == "gpt2" else 15_000.0


class RlsEdit(SpreadMethod):
    """One growing least-squares problem for the whole stream."""

    name = "rlsedit"
    traits = Traits(
        title="RLSEdit, soft recursive least squares",
        paper="arXiv 2601.15686",
        solves_batches=True,
        keeps_state=True,
        solves_values=True,
    )
    Config = RlsEditConfig
    config: RlsEditConfig

    def solve(self, bench: Workbench, layer: int, keys: Tensor, residual: Tensor, tensors: Growing) -> LowRank:
        """Take one recursive step, and carry the inverse information matrix."""
        name = f"inverse|{layer}"
        if name not in tensors:
            tensors[name] = self._anchor(bench, layer)
        gain, root = recursive_step(tensors[name].to(keys.device), keys)
        tensors.grow(name, root, sign=-1, keys=keys)
        return LowRank(residual.double(), gain)

    def forget(self, bench: Workbench, forgotten: Forgotten, state: State) -> tuple[Patch, State]:
        """Leave the step out of the sums; the other steps' keys and values stay as found."""
        return taken_out(bench, self.layers(), forgotten, state)

    def _anchor(self, bench: Workbench, layer: int) -> Tensor:
        """Return M_0; a hair's breadth of ridge makes it exist where the text was short."""
        assert self.config.moment_weight is not None
        moment = bench.moments.get([layer])[layer]
        eye = torch.eye(len(moment.matrix), dtype=torch.float64, device=moment.matrix.device)
        information = self.config.lam**2 * eye + self.config.mu**2 * self.config.moment_weight * moment.matrix
        anchor = Factor.of(information, ridge=moment.ridge).solve(eye)
        return (anchor + anchor.T) / 2


METHOD = RlsEdit
