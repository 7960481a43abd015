"""R-ROME: W <- W + (v* - W k) (C^-1 k)^T / ((C^-1 k)^T k), with one and the same key k in all places.

Gupta, Baskaran and Anumanchipalli, "Rebuilding ROME: Resolving Model Collapse during Sequential Model Editing",
EMNLP 2024, arXiv 2403.07175. ROME's released code takes its direction from the key averaged over contexts and divides
by the inner product with the bare prompt's key; where the two disagree the change explodes and one edit can ruin the
model. r-ROME uses the averaged key throughout, p-ROME (``key="bare"``) that of the bare prompt.
"""

from __future__ import annotations

from pydantic import Field

from everedit.methods._base import Traits
from everedit.methods._rank_one import Key, OneLayerConfig, RankOneMethod


class RRomeConfig(OneLayerConfig):
    """Settings of R-ROME; None means the published value for the family."""

    key: Key = Field("mean", description="the key: mean over contexts (r-ROME) or the bare prompt's (p-ROME)")


class RRome(RankOneMethod):
    """ROME without the mixture of keys that lets single edits explode."""

    name = "r-rome"
    traits = Traits(title="R-ROME, ROME with one key throughout", paper="arXiv 2403.07175", solves_values=True)
    Config = RRomeConfig
    config: RRomeConfig

    def keys_used(self) -> tuple[Key, Key]:
        """Return the configured key twice."""
        return self.config.key, self.config.key


METHOD = RRome
