"""Two models in step: the mixture is one of probabilities, and its ends are the models themselves."""

from __future__ import annotations

import pytest
import torch

from everedit.evaluation.read import generate, read
from everedit.models import LanguageModel
from everedit.models.mixture import MixedPrompts
from everedit.models.model import Speaker
from everedit.models.prefill import prefilled
from tests.support import facts
from tests.support.loading import fresh, shared

FAMILIES = ("llama", "t5")
PAIRS = [(fact.prompt, fact.answer) for fact in facts.facts()[:5]]


def changed_copy(family: str) -> LanguageModel:
    """Another model with the same tokenizer that says other things."""
    other = fresh(family)
    with torch.no_grad():
        other.layout.mlp_out(1).weight.mul_(-6.0)
    return other


def mixing(lm: LanguageModel, other: LanguageModel, share: float) -> LanguageModel:
    lm.redirect = lambda prompts, room: [Speaker(lm, p, second=Speaker(other, p), share=share) for p in prompts]
    return lm


def prompts_of(lm: LanguageModel, other: LanguageModel, share: float) -> MixedPrompts:
    rows = [lm.encode(prompt).ids for prompt, _ in PAIRS]
    return MixedPrompts(prefilled(lm, rows), prefilled(other, rows), torch.full((len(rows),), share))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_sums_to_one_and_is_one_of_probabilities(family: str) -> None:
    lm, other = shared(family), changed_copy(family)
    mixed = prompts_of(lm, other, 0.3)
    found = mixed.logits(mixed.last).exp()
    wanted = 0.7 * lm.logits(mixed.first.last).softmax(-1) + 0.3 * other.logits(mixed.second.last).softmax(-1)
    assert torch.allclose(found.sum(-1), torch.ones(len(PAIRS)), atol=1e-5)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert (found - lm.logits(mixed.first.last).softmax(-1)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_its_ends_are_the_two_models(family: str, share: float) -> None:
    lm, other = fresh(family), changed_copy(family)
    alone = other if share else lm
    targets = [target for _, target in PAIRS]
    readings, texts = read(alone, PAIRS), generate(alone, [prompt for prompt, _ in PAIRS], targets)
    written = alone.generate([PAIRS[0][0]], max_new_tokens=5)
    unlike = generate(lm if share else other, [prompt for prompt, _ in PAIRS], targets)
    both = mixing(lm, other, share)
    for theirs, ours in zip(readings, read(both, PAIRS), strict=True):
        assert (ours.target, ours.predicted) == (theirs.target, theirs.predicted)
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-4)
    assert generate(both, [prompt for prompt, _ in PAIRS], targets) == texts != unlike
    assert both.generate([PAIRS[0][0]], max_new_tokens=5) == written
