"""The tiny test models know the table of facts, and are what their family's real models are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.support import facts, tiny

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerFast]

UNSEEN_PREFIX = "They told me so. "


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(family: str) -> Loaded:
    folder = tiny.trained(family)
    seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_knows_the_facts(loaded: Loaded) -> None:
    assert tiny.accuracy(*loaded) >= 0.95


def test_knows_the_facts_after_a_prefix(loaded: Loaded) -> None:
    assert tiny.accuracy(*loaded, prefix=facts.PREFIXES[1]) >= 0.95
    assert tiny.accuracy(*loaded, prefix=UNSEEN_PREFIX) >= 0.8


def test_does_not_know_the_counterfactuals(loaded: Loaded) -> None:
    assert tiny.accuracy(*loaded, facts.counterfactual) <= 0.15


def test_generates_the_answer(loaded: Loaded) -> None:
    """``knows`` reads one pass over prompt and answer; generation must come to the same."""
    model, tokenizer = loaded
    table = facts.facts()
    known = tiny.knows(model, tokenizer, [(fact.prompt, fact.answer) for fact in table])
    fact = table[known.index(True)]
    inputs = tokenizer(fact.prompt, return_tensors="pt")
    seq2seq = model.config.is_encoder_decoder
    tokens = model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=3
    )[0]
    new = tokens if seq2seq else tokens[inputs.input_ids.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip().startswith(fact.answer)


def test_head_is_tied_as_in_the_family(family: str, loaded: Loaded) -> None:
    model, _ = loaded
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shared == (family in tiny.TIED)


def test_saved_tokenizer_reads_as_built(family: str, loaded: Loaded) -> None:
    built, (_, tokenizer) = tiny.build_tokenizer(family), loaded
    for text in (facts.sentences()[0], " Lisbon", "Yes. Zofia Quell, at 12 o'clock"):
        assert tokenizer(text).input_ids == built(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text.lstrip(
            " " if family == "t5" else ""
        )
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_special_tokens_follow_the_family(family: str, loaded: Loaded) -> None:
    _, tokenizer = loaded
    ids = tokenizer("Yes.").input_ids
    assert (tokenizer.bos_token_id in ids) == family.startswith("gemma")
    assert (tokenizer.eos_token_id in ids) == (family == "t5")


def test_names_split_and_answers_start_apart(loaded: Loaded) -> None:
    _, tokenizer = loaded
    names = [tokenizer(f" {name}", add_special_tokens=False).input_ids for name in facts.SUBJECTS]
    assert all(len(ids) >= 2 for ids in names)
    assert sum(len(ids) >= 4 for ids in names) >= len(names) // 2
    for answers in facts.ANSWERS.values():
        first = {tokenizer(f" {answer}", add_special_tokens=False).input_ids[0] for answer in answers}
        assert len(first) == len(answers)


def test_build_is_seeded_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    models = [tiny.build("gpt2", seed=seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, same, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_model_that_learns_nothing_is_refused() -> None:
    model, tokenizer = tiny.build("gpt2")
    with pytest.raises(RuntimeError, match=r"knows only .* of the facts after 1 steps"):
        tiny.train(model, tokenizer, steps=1)


def test_the_cache_is_used_and_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVEREDIT_TEST_CACHE", str(tmp_path))
    calls: list[int] = []
    monkeypatch.setattr(tiny, "train", lambda *_: calls.append(1))
    folder = tiny.trained("gpt2")
    assert folder.parent == tmp_path
    assert tiny.trained("gpt2") == folder
    assert len(calls) == 1
    assert sorted(path.name for path in tmp_path.glob("*.part")) == []


def test_every_fact_has_a_wrong_answer() -> None:
    for fact in facts.facts():
        assert facts.counterfactual(fact) in facts.ANSWERS[fact.relation]
        assert facts.counterfactual(fact) != fact.answer
    assert len(facts.sentences()) == len(set(facts.sentences())) == 2 * len(facts.facts())
