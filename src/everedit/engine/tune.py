"""Gradient descent on the down projections of some layers: what lies below the lowest of them runs once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.tail import Tail
from everedit.models import LanguageModel
from everedit.models.hooks import replaced_weight

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
    texts = [lm.encode(edit.prompt, edit.target_new) for edit in edits]
    bag = config.objective == "prompt_last"
    parts = [Tail.of(lm, texts[start : start + size], lowest, bag=bag) for start in range(0, len(edits), size)]
    for _ in range(config.steps):
        total = 0.0
        for part in parts:
            with ExitStack() as stack:
                for layer, weight in weights.items():
                    stack.enter_context(replaced_weight(lm.layout.mlp_out(layer), weight))
                loss = part.loss()
            value = float(loss.detach())
            total += value * len(part)
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
