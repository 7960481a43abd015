"""Integrated gradients of an answer's probability by the neurons of every layer, at the prompt's last token.

In a causal model a change at the last token of layer l moves that token in the layers from l on and nothing else. So
the prompt runs once; after that each layer costs passes of a single token, all its scalings as one batch (kn.md, cost).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from everedit.models import LanguageModel
from everedit.models.hooks import capture, replaced_input, resumed_after
from everedit.models.prefill import Prefill, held_cache

__all__ = ["attributions"]


def attributions(lm: LanguageModel, ids: Sequence[int], answer: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return Attr of the token ``answer`` behind ``ids``, and the neurons' activations; (layers, D) float32 each.

    Attr(w) = w / steps * sum over k = 1..steps of dP(k/steps * w)/dw with all neurons of one layer scaled together
    (Dai et al., ACL 2022, equation 2 and its Riemann sum); P is the probability, not its logarithm.
    """
    layout = lm.layout
    outs = {layer: layout.mlp_out(layer) for layer in range(layout.n_layers)}
    blocks = {layer: layout.block(layer) for layer in outs}
    before = Prefill.of(lm, [ids[:-1]]) if len(ids) > 1 else None
    inputs = {("key", layer): module for layer, module in outs.items()}
    inputs |= {("in", layer): block for layer, block in blocks.items()}
    with torch.no_grad(), capture(inputs=inputs, rows=1) as seen:
        _last_token(lm, before, ids, rows=1)
    alphas = torch.arange(1, steps + 1, device=lm.device, dtype=torch.float32) / steps
    found = []
    for layer in outs:
        neurons = seen["key", layer][0, -1].float()
        scaled = (alphas[:, None] * neurons).requires_grad_()
        hidden = seen["in", layer].expand(steps, -1, -1)
        below = [blocks[index] for index in range(layer)]
        with (
            torch.enable_grad(),
            resumed_after(below, hidden, as_tuple=lm.blocks_return_tuples),
            replaced_input(outs[layer], scaled),
        ):
            chance = lm.logits(_last_token(lm, before, ids, rows=steps)).softmax(-1)[:, answer]
            slopes = torch.autograd.grad(chance.sum(), scaled)[0]
        found.append((neurons * slopes.mean(0), neurons))
    scores, activations = zip(*found, strict=True)
    return torch.stack(scores), torch.stack(activations)


def _last_token(lm: LanguageModel, before: Prefill | None, ids: Sequence[int], rows: int) -> Tensor:
    """Run the last token ``rows`` times behind what stands before it, and return its final states (rows, H)."""
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[ids[-1]]] * rows, device=lm.device)}
    if before is not None:
        inputs |= {
            "past_key_values": held_cache(
                [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in before.past]
            ),
            "position_ids": torch.full((rows, 1), len(ids) - 1, device=lm.device),
            "attention_mask": torch.ones(rows, len(ids), dtype=torch.long, device=lm.device),
            "use_cache": True,
        }
    return lm.states(**inputs)[:, -1]
