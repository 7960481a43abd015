"""ROME: W <- W + (v* - W k*) (C^-1 k*)^T / ((C^-1 k*)^T k*), the least change of one matrix that maps k* to v*.

Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, equation 2. The key k* is the
input of the MLP's down projection in layer L at the subject's last token, averaged over sampled contexts; the
value v* is found by gradient descent on the MLP's output there. As in the released code, the direction
C^-1 k uses the averaged key and the rest the key of the bare prompt; the form that uses one key throughout is r-rome.
"""

from __future__ import annotations

from everedit.methods._base import Traits
from everedit.methods._rank_one import Key, OneLayerConfig, RankOneMethod


class RomeConfig(OneLayerConfig):
    """Settings of ROME; None means the published value for the family."""


class Rome(RankOneMethod):
    """One fact, one matrix, rank one."""

    name = "rome"
    traits = Traits(title="ROME, rank-one model editing", paper="arXiv 2202.05262", solves_values=True)
    Config = RomeConfig
    config: RomeConfig

    def keys_used(self) -> tuple[Key, Key]:
        """Return the averaged key for the direction, that of the bare prompt for the rest."""
        return "mean", "bare"


METHOD = Rome
