"""Losses of single tokens without keeping logits: equal to cross-entropy of all logits, also in their gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from everedit.engine import token_losses as module
from everedit.engine.token_losses import token_losses
from tests.support.loading import fresh


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_equals_cross_entropy_of_all_logits(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fresh(family)
    vocabulary = int(lm.model.config.vocab_size)
    monkeypatch.setattr(module, "_LOGITS_A_CHUNK", chunk * vocabulary)
    states = torch.randn(7, lm.layout.hidden_size, requires_grad=True)
    labels, weights = torch.randint(vocabulary, (7,)), torch.rand(7)
    found, chosen = token_losses(lm, states, labels)
    [slope] = torch.autograd.grad((weights * found).sum(), states)
    logits = lm.logits(states)
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(slope, torch.autograd.grad((weights * wanted).sum(), states)[0])
    assert torch.equal(chosen, logits.argmax(-1))
    assert slope.abs().sum() > 0


def test_without_gradient_and_without_rows() -> None:
    lm = fresh("llama")
    states, labels = torch.randn(3, lm.layout.hidden_size), torch.tensor([1, 2, 3])
    found, _ = token_losses(lm, states, labels)
    assert not found.requires_grad
    torch.testing.assert_close(found, F.cross_entropy(lm.logits(states), labels, reduction="none"))
    assert [len(part) for part in token_losses(lm, states[:0], labels[:0])] == [0, 0]
