"""Gradient descent on the down projections of some layers: what lies below the lowest of them runs once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.errors import NumericalError
from everedit.models import LanguageModel
from everedit.models.hooks import capture, replaced_weight, resumed_after, stopping_at
from everedit.models.tokens import Batch

__all__ = ["Objective", "TuneConfig", "tune"]

Objective = Literal["prompt_last", "target_new"]


@dataclass(frozen=True)
class TuneConfig:
    """Settings of a training: see :class:`everedit.methods._finetune.FinetuneConfig`."""

    steps: int
    lr: float
    stop_loss: float
    weight_decay: float
    rows_a_step: int
    objective: Objective
    box: float | None


def tune(
    lm: LanguageModel,
    edits: Sequence[Edit],
    starts: Mapping[int, Tensor],
    config: TuneConfig,
    centres: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Return the change (d_out, d_in) float32 of each layer's down projection that makes ``edits`` likely.

    Adam from ``starts``, the weights by layer in float32; the model stays as it is. After each step every weight is put
    back into the box of radius ``config.box`` around ``centres`` (by layer; ``starts`` if None). Inputs of the lowest
    layer's block do not change and are computed once (ft.md, "Cost and reuse").

    Raises :class:`NumericalError` if a loss is not finite.
    """
    lowest = min(starts)
    weights = {layer: start.clone().requires_grad_() for layer, start in starts.items()}
    # Without foreach and fused kernels: a single large tensor gains nothing from them.
    optimiser = torch.optim.Adam(list(weights.values()), lr=config.lr, weight_decay=config.weight_decay, foreach=False)
    size = config.rows_a_step
    parts = [_Part.of(lm, edits[start : start + size], lowest, config) for start in range(0, len(edits), size)]
    for _ in range(config.steps):
        total = 0.0
        for part in parts:
            loss = part.loss(lm, weights, lowest)
            value = float(loss.detach())
            if not torch.isfinite(loss.detach()):
                raise NumericalError(what="training met a loss that is not finite", fix="lower the learning rate (lr)")
            total += value * part.edits
            if value < config.stop_loss:
                continue
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            if config.box is not None:
                _into_box(weights, centres or starts, config.box)
        if total / len(edits) < config.stop_loss:
            break
    return {layer: (weight.detach() - starts[layer]).contiguous() for layer, weight in weights.items()}


@torch.no_grad()
def _into_box(weights: Mapping[int, Tensor], centres: Mapping[int, Tensor], radius: float) -> None:
    for layer, weight in weights.items():
        centre = centres[layer].to(weight.device)
        weight.copy_(torch.clamp(weight, centre - radius, centre + radius))


@dataclass
class _Part:
    """Rows of one gradient step: the states that enter the lowest trained block, and what to score where."""

    batch: Batch
    hidden: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    shares: Tensor
    edits: int

    @classmethod
    def of(cls, lm: LanguageModel, edits: Sequence[Edit], lowest: int, config: TuneConfig) -> _Part:
        texts = [lm.encode(edit.prompt, edit.target_new) for edit in edits]
        bag = config.objective == "prompt_last"
        # The last target token is never an input; a bag of target tokens is scored behind the prompt alone.
        batch = lm.pad([text.ids[: text.prompt_end] if bag else text.ids[:-1] for text in texts])
        block = lm.layout.block(lowest)
        with torch.no_grad(), capture(inputs={"in": block}, rows=len(texts)) as seen, stopping_at(block, before=True):
            lm.states(**batch.inputs())
        places = [
            (row, (text.prompt_end if bag else position) - 1, text.ids[position], 1 / len(text.target_ids) / len(texts))
            for row, text in enumerate(texts)
            for position in range(*text.target)
        ]
        rows, columns, labels, shares = (torch.tensor(values, device=lm.device) for values in zip(*places, strict=True))
        return cls(batch, seen["in"].clone(), rows, columns, labels, shares, len(edits))

    def loss(self, lm: LanguageModel, weights: Mapping[int, Tensor], lowest: int) -> Tensor:
        """Mean over the edits of each one's mean loss over its target tokens."""
        with ExitStack() as stack:
            for layer, weight in weights.items():
                stack.enter_context(replaced_weight(lm.layout.mlp_out(layer), weight))
            below = [lm.layout.block(index) for index in range(lowest)]
            if below:
                stack.enter_context(resumed_after(below, self.hidden, as_tuple=lm.blocks_return_tuples))
            states = lm.states(**self.batch.inputs())
        logits = lm.logits(states[self.rows, self.columns])
        return (F.cross_entropy(logits, self.labels, reduction="none") * self.shares).sum()
