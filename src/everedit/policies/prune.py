"""PRUNE: W + U F(S) V^T for the stream's sum U S V^T, with F(s) = log_a(s) - log_a(s_max) + s_max above s_max.

Ma et al., "Perturbation-Restrained Sequential Model Editing", ICLR 2025, arXiv 2405.16821. s_max is the largest
singular value of the original weight W; what is below it stays. The restrained weight is what the model shows; the
stream goes on from the plain sum, and W itself is never counted twice, as two public baselines do (prune.md).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from everedit.engine.solve import largest_singular_value
from everedit.policies._base import Policy, PolicyConfig

_BASES = {"log": math.e, "log2": 2.0, "log1_5": 1.5, "log1_2": 1.2}


class PruneConfig(PolicyConfig):
    """Settings of PRUNE."""

    function: Literal["log", "log2", "log1_5", "log1_2", "linear"] = Field(
        "log1_2", description="F above s_max: a logarithm of base e, 2, 1.5 or 1.2, or the mean of s and s_max"
    )
    cap: bool = Field(
        False, description="never enlarge: the published F does, just above an s_max smaller than 1 / ln(base)"
    )


class Prune(Policy):
    """Restrains the largest singular values of all changes together."""

    name = "prune"
    title = "PRUNE, restrained singular values of the sum"
    paper = "arXiv 2405.16821"
    stage = "read-out"
    Config = PruneConfig
    config: PruneConfig

    def restrain(self, values: Tensor, top: float) -> Tensor:
        """Return F of singular values, given the original weight's largest, ``top``."""
        if self.config.function == "linear":
            return torch.where(values < top, values, (values + top) / 2)
        base = _BASES[self.config.function]
        restrained = (values.clamp_min(top).log() - math.log(top)) / math.log(base) + top
        if self.config.cap:
            restrained = torch.minimum(restrained, values)
        return torch.where(values < top, values, restrained)

    def read_out(self, base: Tensor, shift: Tensor) -> Tensor:
        """Return the sum with its large singular values restrained."""
        # The norm bounds the sum's largest singular value from above, and that of the original from below if shared
        # out evenly: most sums are let through without a decomposition.
        if float(shift.norm()) < float(base.norm()) / min(base.shape) ** 0.5:
            return shift
        top = largest_singular_value(base)
        if not top:
            # Without a size to compare with there is nothing to restrain.
            return shift
        # Only triplets above the threshold change, and they come from the smaller of the two Gram matrices.
        wide = shift.shape[0] <= shift.shape[1]
        squares, vectors = torch.linalg.eigh(shift @ shift.T if wide else shift.T @ shift)
        values = squares.clamp_min(0).sqrt()
        large = values >= top
        if not bool(large.any()):
            return shift
        vectors, values = vectors[:, large], values[large]
        factors = self.restrain(values, top) / values - 1
        if wide:
            return shift + (vectors * factors) @ (vectors.T @ shift)
        return shift + (shift @ vectors * factors) @ vectors.T


POLICY = Prune
