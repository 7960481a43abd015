"""FT-M: theta <- theta - lr * Adam(grad of -(1/n) sum_j log p(y_j | x, y_<j)), on the down projection of one layer.

Fine-tuning with the usual teacher-forced loss on the target's tokens alone, as EasyEdit's objective "target_new"
(Zhang et al., "A Comprehensive Study of Knowledge Editing for Large Language Models", arXiv 2401.01286).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from everedit.engine.tune import Objective
from everedit.methods._base import SMOLLM2_135M, Searched, Traits
from everedit.methods._finetune import FinetuneConfig, FinetuneMethod


class FtMConfig(FinetuneConfig):
    """Settings of FT-M; None means the published value for the family."""

    searched: ClassVar[Searched] = {SMOLLM2_135M: {"layers": (26,), "lr": 2e-3}}

    objective: Objective = Field("target_new", description="each target token is scored at its own place")


class FtM(FinetuneMethod):
    """Fine-tuning of one matrix on the target's tokens."""

    name = "ft-m"
    traits = Traits(
        title="FT-M, fine-tuning of one layer on the target's tokens",
        paper="arXiv 2401.01286",
        needs_subject=False,
        needs_moments=False,
        solves_batches=True,
        keeps_state=True,
        encoder_decoder=True,
        writes_mlp_values=False,
    )
    Config = FtMConfig
    config: FtMConfig


METHOD = FtM
