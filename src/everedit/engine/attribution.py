"""Integrated gradients of an answer's probability by the neurons of every layer, at the prompt's last token.

In a causal model a change at the last token of layer l moves that token in the layers from l on and nothing else. So
the prompt runs once; after that each layer costs passes of a single token, all its scalings as one batch (kn.md, cost).
So few rows would wait for the weights: a few layers in a row share a batch, which begins at the lowest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from everedit.engine.rows import chunks
from everedit.models import LanguageModel
from everedit.models.encoded_prompts import EncodedPrompts
from everedit.models.hooks import capture, replaced_input, resumed_after
from everedit.models.prefill import held_cache, prefilled

__all__ = ["attributions"]

# With fewer rows a matrix product waits for the weights; with more layers in a batch, more blocks run for nothing.
_ROWS_A_PASS = 128


def attributions(lm: LanguageModel, ids: Sequence[int], answer: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return Attr of the token ``answer`` behind ``ids``, and the neurons' activations; (layers, D) float32 each.

    Attr(w) = w / steps * sum over k = 1..steps of dP(k/steps * w)/dw with all neurons of one layer scaled together
    (Dai et al., ACL 2022, equation 2 and its Riemann sum); P is the probability, not its logarithm.
    """
    layout = lm.layout
    outs = {layer: layout.mlp_out(layer) for layer in range(layout.n_layers)}
    blocks = {layer: layout.block(layer) for layer in outs}
    run = _LastToken(lm, ids)
    inputs = {("key", layer): module for layer, module in outs.items()}
    inputs |= {("in", layer): block for layer, block in blocks.items()}
    with torch.no_grad(), capture(inputs=inputs, rows=1) as seen:
        run(rows=1)
    alphas = torch.arange(1, steps + 1, device=lm.device, dtype=torch.float32) / steps
    neurons = torch.stack([seen["key", layer][0, -1].float() for layer in outs])
    slopes = []
    for group in chunks([steps] * len(outs), _ROWS_A_PASS):
        layers = list(outs)[group]
        scaled = [(alphas[:, None] * neurons[layer]).requires_grad_() for layer in layers]
        rows = steps * len(layers)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if layout.is_decoder_only:
                below = [blocks[index] for index in range(layers[0])]
                hidden = seen["in", layers[0]].expand(rows, -1, -1)
                stack.enter_context(resumed_after(below, hidden, as_tuple=lm.blocks_return_tuples))
            for index, layer in enumerate(layers):
                own = slice(index * steps, (index + 1) * steps)
                stack.enter_context(replaced_input(outs[layer], scaled[index], rows=own))
            chance = lm.logits(run(rows=rows)).softmax(-1)[:, answer]
            slopes += [slope.mean(0) for slope in torch.autograd.grad(chance.sum(), scaled)]
    return neurons * torch.stack(slopes), neurons


class _LastToken:
    """The token that predicts the answer: a decoder's last, or the start token of an encoder-decoder."""

    def __init__(self, lm: LanguageModel, ids: Sequence[int]) -> None:
        self.lm, self.ids = lm, ids
        self.decoder = lm.layout.is_decoder_only
        # What stands before it runs once.
        self.before = prefilled(lm, [ids[:-1] if self.decoder else ids]) if not self.decoder or len(ids) > 1 else None

    def __call__(self, rows: int) -> Tensor:
        """Run it ``rows`` times and return its final states (rows, H)."""
        lm, ids, before = self.lm, self.ids, self.before
        if isinstance(before, EncodedPrompts):
            return before.states_of(torch.zeros(rows, dtype=torch.long, device=lm.device), [()] * rows)[:, -1]
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
