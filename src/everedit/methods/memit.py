"""MEMIT: Delta_l = R_l K_l^T (w C_l + K_l K_l^T)^-1 for each layer l of a range, in ascending order.

Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, equations 14 and 20. For each fact a hidden
state z at the last layer L of the range is optimised; then every layer, with the changes of the layers
before it in place, takes an equal share R_l = (Z - h) / (layers left) of what is still missing.
"""

from __future__ import annotations

from pydantic import Field

from everedit.methods._base import Traits
from everedit.methods._spread import RidgeConfig, RidgeMethod


class MemitConfig(RidgeConfig):
    """Settings of MEMIT; None means the published value for the family."""

    # With no weight at all nothing would keep other keys where they are.
    moment_weight: float | None = Field(None, gt=0, description="w, the weight of the second moments")


class Memit(RidgeMethod):
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


METHOD = Memit
