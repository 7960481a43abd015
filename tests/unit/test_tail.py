"""Texts that run again from one block on: losses of the whole model, the last MLP only where needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.engine.tail import Tail
from everedit.models.hooks import replaced_weight
from everedit.models.layout import oriented
from tests.support.editing import home_town
from tests.support.loading import shared


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text", "opt", "t5"])
@pytest.mark.parametrize("depth", ["middle", "last"])
def test_losses_and_gradients_are_those_of_the_whole_model(family: str, depth: str) -> None:
    lm = shared(family)
    layer = lm.layout.n_layers - 1 if depth == "last" else lm.layout.n_layers // 2
    first, second = home_town(0), home_town(3)
    # Of unlike lengths, so that a row has padding.
    texts = [lm.encode(first.prompt, first.target_new), lm.encode(f"{second.prompt} now,", second.target_new)]
    tail, module = Tail.of(lm, texts, layer), lm.layout.mlp_out(layer)
    weight = oriented(module)

    def of(losses: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        free = weight.float().clone().requires_grad_()
        with replaced_weight(module, free):
            found = losses()
        return found.detach(), torch.autograd.grad(found.sum(), free)[0]

    ours = of(tail.losses)
    plain = of(lambda: F.cross_entropy(tail.logits(), tail.labels, reduction="none"))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert float(ours[1].abs().sum()) > 0


def test_the_last_mlp_runs_only_where_a_token_is_scored() -> None:
    lm = shared("llama")
    texts = [lm.encode(home_town(person).prompt, home_town(person).target_new) for person in range(3)]
    tail, seen = Tail.of(lm, texts, 1), []
    mlp = lm.layout.mlp(lm.layout.n_layers - 1)
    assert mlp is not None
    handle = lm.layout.mlp_out(lm.layout.n_layers - 1).register_forward_hook(
        lambda _, args, __: seen.append(args[0][..., 0].numel())
    )
    try:
        tail.losses()
        tail.logits()
    finally:
        handle.remove()
    # Each scored token once, against every token of every row.
    assert seen == [len(tail.labels), tail.forced.real.numel()]
    assert seen[0] < seen[1]
