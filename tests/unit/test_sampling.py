"""Sampled text comes from the model's distribution, from a generator of its own."""

from __future__ import annotations

import torch

from everedit.models.sampling import Sampler
from tests.support.loading import shared


def _draws(scores: torch.Tensor, top_k: int, times: int) -> torch.Tensor:
    chosen = Sampler(top_k, 3)(torch.zeros(times, 1), scores.expand(times, -1)).argmax(-1)
    return torch.bincount(chosen, minlength=scores.shape[-1]) / times


def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -30.0, 0.5]])
    share = _draws(scores, 0, 40_000)
    assert torch.allclose(share, scores.softmax(-1)[0], atol=0.01)
    assert share[3] == 0


def test_top_k_draws_from_the_k_likeliest_alone() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0, -30.0, 0.5]])
    share = _draws(scores, 2, 20_000)
    assert share[[0, 3, 4]].sum() == 0
    assert torch.allclose(share[[1, 2]], scores[0, [1, 2]].softmax(-1), atol=0.015)


def test_a_seed_gives_the_same_text_and_leaves_the_process_state_alone() -> None:
    lm = shared("gpt2")
    rows = [list(lm.encode("The").ids)] * 6
    state = torch.get_rng_state()
    first = lm.generate_ids(rows, max_new_tokens=6, top_k=0, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert lm.generate_ids(rows, max_new_tokens=6, top_k=0, seed=5) == first
    assert lm.generate_ids(rows, max_new_tokens=6, top_k=0, seed=6) != first
