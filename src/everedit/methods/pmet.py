"""PMET: MEMIT with a value optimised together with one for the attention, and R_l = (V - W k) / sqrt(layers left).

Li et al., "PMET: Precise Model Editing in a Transformer", AAAI 2024, arXiv 2308.08742. Two vectors are optimised
at the last layer, one added to the attention's output and one to the MLP's, so that what belongs to the attention does
not enter the weights: only the MLP's is written. Once the model says the target its loss counts a tenth, and the
optimisation ends when the subject's own distribution is near what it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.engine.target import Target
from everedit.methods._base import Traits
from everedit.methods._spread import RidgeConfig, RidgeMethod


class PmetConfig(RidgeConfig):
    """Settings of PMET; None means the published value for the family."""

    searched_weight: ClassVar[float] = 10.0

    moment_weight: float | None = Field(None, gt=0, description="w, the weight of the second moments")
    share: Literal["equal", "sqrt"] = Field("sqrt", description="how the residual is shared among the layers")

    def published_target(self, family: str) -> dict[str, float]:
        """Return the published settings of the value optimisation."""
        if family == "gptj":
            return {"steps": 30, "lr": 0.2, "weight_decay": 0.5, "clamp": 0.75, "kl": 1.0, "ease": True}
        if family == "gpt_neox":
            return {"steps": 30, "lr": 0.5, "weight_decay": 0.5, "clamp": 0.8, "kl": 0.8, "ease": True}
        return {"steps": 20, "lr": 0.5, "weight_decay": 0.5, "clamp": 1.0, "ease": True}

    def published_weight(self, family: str) -> float:
        """Return the original code's weight for GPT-J, EasyEdit's elsewhere."""
        return 6_000.0 if family == "gptj" else 15_000.0


class Pmet(RidgeMethod):
    """MEMIT with the attention's share of a value kept out of the weights."""

    name = "pmet"
    traits = Traits(
        title="PMET, precise values for the MLP alone",
        paper="arXiv 2308.08742",
        solves_batches=True,
        solves_values=True,
    )
    Config = PmetConfig
    config: PmetConfig
    site = "attention+mlp"

    def residual(self, targets: Sequence[Target], state: Tensor, output: Tensor) -> Tensor:
        """Return what is missing of the MLP's output in the last layer."""
        return torch.stack([target.value for target in targets]) - output


METHOD = Pmet
