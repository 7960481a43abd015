"""Losses of single tokens from final states, without the logits of all of them, or their gradient, at one time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.models import LanguageModel

__all__ = ["token_losses"]

_LOGITS_A_CHUNK = 1 << 22
_LOGITS_A_CHUNK_ON_ACCELERATOR = 1 << 28


def token_losses(lm: LanguageModel, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood of ``labels`` (n,) and the model's own choices (n,), from states (n, H).

    A state's gradient, H values, is found with its logits and kept in their stead: they are V values, and the
    vocabulary V of a small model is a hundred times H.
    """
    if not len(states):
        return states.new_zeros(0, dtype=torch.float32), labels
    losses, chosen = _TokenLosses.apply(states, labels, lm)  # type: ignore[no-untyped-call]
    return losses, chosen


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, lm: LanguageModel) -> tuple[Tensor, Tensor]:
        most = _LOGITS_A_CHUNK_ON_ACCELERATOR if lm.on_accelerator else _LOGITS_A_CHUNK
        rows = max(1, most // int(lm.model.config.vocab_size))
        wanted = states.requires_grad
        losses, chosen, gradients = [], [], []
        for state, label in zip(states.split(rows), labels.split(rows), strict=True):
            with torch.set_grad_enabled(wanted):
                part = state.detach().requires_grad_(wanted)
                logits = lm.logits(part)
                loss = F.cross_entropy(logits, label, reduction="none")
                if wanted:
                    gradients.append(torch.autograd.grad(loss.sum(), part)[0])
            losses.append(loss.detach())
            chosen.append(logits.detach().argmax(-1))
        ctx.gradients = torch.cat(gradients) if wanted else None
        best = torch.cat(chosen)
        ctx.mark_non_differentiable(best)
        return torch.cat(losses), best

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return (gradients[0][:, None] * ctx.gradients).to(ctx.gradients.dtype), None, None
