"""FT: theta <- theta - lr * Adam(grad of -(1/n) sum_j log p(y_j | x)), on the down projection of one layer.

The baseline of Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022: plain fine-tuning
until the loss is small, with every target token scored at the prompt's last one and without any constraint.
"""

from __future__ import annotations

from typing import ClassVar

from everedit.methods._base import SMOLLM2_135M, Searched, Traits
from everedit.methods._finetune import FinetuneConfig, FinetuneMethod


class FtConfig(FinetuneConfig):
    """Settings of FT; None means the published value for the family."""

    searched: ClassVar[Searched] = {SMOLLM2_135M: {"layers": (20,), "lr": 2e-3}}


class Ft(FinetuneMethod):
    """Fine-tuning of one matrix, unconstrained."""

    name = "ft"
    traits = Traits(
        title="FT, fine-tuning of one layer",
        paper="arXiv 2202.05262",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        keeps_state=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = FtConfig
    config: FtConfig


METHOD = Ft
