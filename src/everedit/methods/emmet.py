"""EMMET: Delta = R (K^T C^-1 K + eps I)^-1 K^T C^-1, the least change that maps all keys of a batch to their values.

Gupta, Sajnani and Anumanchipalli, "A Unified Framework for Model Editing", arXiv 2403.14236. With eps = 0 the values
are met exactly and the scale c of the second moments cancels; with eps > 0 it is MEMIT at one layer with the weight
c * eps. As in the original code eps counts only for batches of more than one edit.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from everedit.engine.bench import Workbench
from everedit.engine.solve import equality_update
from everedit.engine.spread import at_depth, check_layers
from everedit.engine.state import Growing
from everedit.methods._base import Traits
from everedit.methods._spread import SpreadConfig, SpreadMethod
from everedit.models.layout import Layout
from everedit.patch import LowRank

_LAYER = {("gpt2", 48): 17, ("gptj", 28): 5, ("llama", 32): 5}


class EmmetConfig(SpreadConfig):
    """Settings of EMMET; None means the published value for the family."""

    ridge: float = Field(0.1, ge=0, description="eps, added to the batch's Gram matrix")
    ridge_for_one: bool = Field(False, description="add it also to a batch of one edit, as EasyEdit does")
    moment_scale: float | None = Field(None, gt=0, description="c, a factor on the second moments")

    def own_choices(self, layout: Layout, *, searched: bool) -> dict[str, Any]:
        """Return the published layer and scale."""
        family, depth = layout.family.name, layout.n_layers
        chosen: dict[str, Any] = {"moment_scale": self.moment_scale or (1_000.0 if family == "gpt2" else 1.0)}
        if self.layers is None:
            layer = 12 if searched else _LAYER.get((family, depth), at_depth(1 / 6, depth))
            chosen["layers"] = check_layers((layer,), depth)
        return chosen


class Emmet(SpreadMethod):
    """A batch of facts, met exactly, usually in one matrix."""

    name = "emmet"
    traits = Traits(
        title="EMMET, equality-constrained mass editing",
        paper="arXiv 2403.14236",
        solves_batches=True,
        solves_values=True,
    )
    Config = EmmetConfig
    config: EmmetConfig

    def solve(self, bench: Workbench, layer: int, keys: Tensor, residual: Tensor, tensors: Growing) -> LowRank:
        """Solve the equality-constrained problem."""
        assert self.config.moment_scale is not None
        ridge = self.config.ridge if keys.shape[1] > 1 or self.config.ridge_for_one else 0.0
        factor = bench.moments.get([layer])[layer].factor
        return equality_update(factor, self.config.moment_scale, ridge, keys, residual)


METHOD = Emmet
