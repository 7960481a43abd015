"""What neurons beside an MLP should amount to: the same MLP made wider, and texts read or written without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from everedit.models import LanguageModel
from everedit.models.layout import oriented
from tests.support.loading import fresh


def widened(family: str, layer: int, parts: Mapping[str, Tensor]) -> LanguageModel:
    """Return a family's model whose MLP of one layer has more neurons: ``keys``, ``values`` and, if given, ``biases``
    and ``gates``, which read the MLP's input and write to its output as the model's own do.
    """
    lm = fresh(family)
    block, names = lm.layout.block(layer), lm.layout.mlp_in_names
    rows = [parts["gates"], parts["keys"]] if len(names) > 1 else [parts["keys"]]
    assert ("gates" in parts) == (len(names) > 1)
    for name, more in zip(names, rows, strict=True):
        module = block.get_submodule(name)
        bias = torch.cat([_bias(module), parts.get("biases", torch.zeros(len(more)))])
        block.set_submodule(name, _linear(torch.cat([oriented(module), more]), bias))
    out = lm.layout.mlp_out(layer)
    wide = _linear(torch.cat([oriented(out), parts["values"].T], dim=1), _bias(out))
    block.set_submodule(lm.layout.family.mlp_out, wide)
    return lm


def _bias(module: nn.Module) -> Tensor:
    if module.bias is None:
        return torch.zeros(len(oriented(module)))
    return module.bias.detach()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(*reversed(weight.shape)).requires_grad_(False)
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made


def whole_states(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """Return the final states (tokens, H) of one text by itself."""
    return lm.states(**lm.pad([ids]).inputs())[0]


@torch.no_grad()
def greedy(lm: LanguageModel, ids: Sequence[int], count: int) -> list[int]:
    """Return the first choices behind a text, up to the end token, each from a whole forward of all before it."""
    found: list[int] = []
    while len(found) < count and lm.tokenizer.eos_token_id not in found:
        logits = lm.model(torch.tensor([[*ids, *found]]), use_cache=False).logits[0, -1]
        found.append(int(logits.argmax()))
    return found
