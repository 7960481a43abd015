"""Scoring runs what it must and no more: equal numbers on every tokenizer, beginnings run once, logits where read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from everedit.evaluation import read as reading
from everedit.models import LanguageModel, load_model
from tests.support import facts, tiny
from tests.support.loading import DECODERS, fresh, shared

STORY = "Well, it rained all day. We had tea at noon. I heard it again today. The book was long. "


def pairs() -> list[tuple[str, str]]:
    """Prompts short and long, with one and with several targets, some of them beginning alike for many tokens."""
    table = facts.facts()[:12]
    found = [(fact.prompt, fact.answer) for fact in table]
    found += [(table[0].prompt, facts.counterfactual(table[0])), (table[1].rephrase, "a clock maker in Buenos Aires")]
    return found + [(f"{STORY}{fact.rephrase}", fact.answer) for fact in table[:5]]


@torch.no_grad()
def alone(lm: LanguageModel, prompt: str, target: str) -> tuple[list[int], float]:
    """First choices and mean loss of a target's tokens, from one whole row with all logits."""
    if not lm.layout.is_decoder_only:
        text = lm.encode(prompt, target)
        ends = [*text.ids[: text.prompt_end], lm.tokenizer.eos_token_id]
        begun = [lm.model.config.decoder_start_token_id, *text.target_ids[:-1]]
        logits = lm.model(torch.tensor([ends]), decoder_input_ids=torch.tensor([begun])).logits[0].float()
        wanted = torch.tensor(text.target_ids)
    else:
        begun, ids = (lm.tokenizer(text).input_ids for text in (prompt, f"{prompt} {target}"))
        assert ids[: len(begun)] == begun
        wanted = torch.tensor(ids[len(begun) :])
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0, len(begun) - 1 : -1].float()
    return logits.argmax(-1).tolist(), float(F.cross_entropy(logits, wanted))


def compare(lm: LanguageModel, asked: list[tuple[str, str]], slack: float) -> None:
    for found, pair in zip(reading.read(lm, asked), asked, strict=True):
        predicted, nll = alone(lm, *pair)
        assert list(found.predicted) == predicted, pair
        assert found.nll == pytest.approx(nll, abs=slack), pair


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_batches_score_as_single_rows_on_every_tokenizer(family: str) -> None:
    assert set(DECODERS) | {"t5"} == set(tiny.FAMILIES)
    compare(shared(family), pairs(), 2e-4)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_batches_score_as_single_rows_on_real_tokenizers(name: str) -> None:
    passage = "The council met on Monday to talk about the bridge over the river, which had been closed since spring. "
    asked = [
        ("The capital of France is", "Paris"),
        ("The capital of France is", "Saint-Étienne"),
        ("La capitale du Pérou, c'est", "Lima"),
        ("日本の首都は", "東京"),
        (f"{passage}The talk was about", "the bridge"),
        (f"{passage}They met on", "Monday"),
        (f"{passage}{passage}It is closed since", "spring"),
    ]
    compare(load_model(name, device="cpu", dtype="float32"), asked, 2e-3)


def counted(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, str]]) -> tuple[int, int, Any]:
    """The tokens that pass through the model, padding too, the rows of logits made, and what was read."""
    tokens, logits = 0, 0
    states, head = LanguageModel.states, LanguageModel.logits

    def through(self: LanguageModel, **inputs: Any) -> torch.Tensor:
        nonlocal tokens
        tokens += inputs["input_ids"].numel()
        return states(self, **inputs)

    def made(self: LanguageModel, given: torch.Tensor) -> torch.Tensor:
        nonlocal logits
        logits += given.shape[:-1].numel()
        return head(self, given)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "states", through)
        patched.setattr(LanguageModel, "logits", made)
        found = reading.read(lm, asked)
    return tokens, logits, found


def test_a_long_beginning_runs_once_and_logits_are_made_where_targets_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = shared("llama")
    asked = [(f"{STORY}{fact.rephrase}", fact.answer) for fact in facts.facts()[:12]]
    story = len(lm.encode(STORY.strip()).ids)
    whole = sum(len(lm.encode(*pair).ids) for pair in asked)
    tokens, logits, found = counted(lm, monkeypatch, asked)
    assert tokens < whole - 10 * story
    assert logits == sum(len(reading.target) for reading in found)
    # Prompts that have little in common cost what they are long, and hardly any padding.
    asked = pairs()[:12]
    needed = sum(len(lm.encode(*pair).ids) - 1 for pair in asked)
    assert needed <= counted(lm, monkeypatch, asked)[0] <= 1.5 * needed


def test_local_attention_sees_as_far_as_it_should_past_a_shared_beginning() -> None:
    """Padding behind a shared beginning must not push it out of a window."""
    for family in ("mistral", "gpt_neo", "gemma2"):
        lm = shared(family)
        asked = [(f"{STORY}{fact.prompt}", fact.answer) for fact in facts.facts()[:6]]
        asked.append((f"{STORY}Mira", "was here"))
        compare(lm, asked, 2e-4)


def test_ids_are_read_as_texts_are() -> None:
    lm = fresh("gpt2")
    texts = [lm.encode(*pair) for pair in pairs()]
    by_ids = reading.read_ids(lm, [(text.ids[: text.prompt_end], text.target_ids) for text in texts])
    for one, other in zip(by_ids, reading.read(lm, pairs()), strict=True):
        assert (one.target, one.predicted) == (other.target, other.predicted)
        assert one.nll == pytest.approx(other.nll, abs=1e-5)
