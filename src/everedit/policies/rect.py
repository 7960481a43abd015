"""RECT: Delta <- Delta where |Delta| / (|W| + 1e-8) is among the largest k %, and 0 elsewhere.

Gu et al., "Model Editing Harms General Abilities of Large Language Models: Regularization to the Rescue", EMNLP 2024,
arXiv 2401.04700. A filter on the finished change of any weight editor, for each matrix by itself.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from everedit.patch import Dense, Patch
from everedit.policies._base import Policy, PolicyConfig, Step


class RectConfig(PolicyConfig):
    """Settings of RECT."""

    keep: float = Field(0.2, gt=0, le=1, description="share of entries kept; ROME as published 0.2, MEMIT 0.4")


class Rect(Policy):
    """Keeps the entries that change most for their size."""

    name = "rect"
    title = "RECT, keeping the largest relative changes"
    paper = "arXiv 2401.04700"
    stage = "patch"
    Config = RectConfig
    config: RectConfig

    def filter(self, step: Step) -> Patch:
        """Return the change with all but the largest relative entries set to zero."""
        if self.config.keep == 1:
            return step.patch
        deltas = {
            name: Dense(self._kept(delta.dense(), step.weight(name))) for name, delta in step.patch.deltas.items()
        }
        return Patch(deltas, step.patch.info)

    def _kept(self, change: Tensor, weight: Tensor) -> Tensor:
        score = (change.abs() / (weight.to(change).abs() + 1e-8)).flatten()
        count = max(1, round(self.config.keep * score.numel()))
        best = score.topk(count, sorted=False).indices
        kept = change.new_zeros(score.numel())
        kept[best] = change.flatten()[best]
        return kept.view_as(change)


POLICY = Rect
