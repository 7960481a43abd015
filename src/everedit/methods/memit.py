"""MEMIT: Delta_l = R_l K_l^T (w C_l + K_l K_l^T)^-1 for each layer l of a range, in ascending order.

Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, equations 14 and 20. For each fact a hidden
state z at the last layer L of the range is optimised; then every layer, with the changes of the layers
before it in place, takes an equal share R_l = (Z - h) / (layers left) of what is still missing.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from everedit.engine.bench import Workbench
from everedit.engine.solve import ridge_update
from everedit.methods._base import Traits
from everedit.methods._spread import SpreadConfig, SpreadMethod
from everedit.models.layout import Layout
from everedit.patch import LowRank


class MemitConfig(SpreadConfig):
    """Settings of MEMIT; None means the published value for the family."""

    moment_weight: float | None = Field(None, gt=0, description="w, the weight of the second moments")

    def own_choices(self, layout: Layout, *, searched: bool) -> dict[str, Any]:
        """Return the published weight, or the one searched for."""
        published = 20_000.0 if layout.family.name in ("gpt2", "gpt_neox") else 15_000.0
        return {"moment_weight": self.moment_weight or (50.0 if searched else published)}


class Memit(SpreadMethod):
    """Many facts at once, spread over several layers."""

    name = "memit"
    traits = Traits(
        title="MEMIT, mass editing over several layers",
        paper="arXiv 2210.07229",
        solves_batches=True,
        solves_values=True,
    )
    Config = MemitConfig
    config: MemitConfig

    def solve(
        self, bench: Workbench, layer: int, keys: Tensor, residual: Tensor, tensors: dict[str, Tensor]
    ) -> LowRank:
        """Solve the regularised least-squares problem with the layer's second moments."""
        assert self.config.moment_weight is not None
        return ridge_update(bench.moments.get([layer])[layer].factor, self.config.moment_weight, keys, residual)


METHOD = Memit
