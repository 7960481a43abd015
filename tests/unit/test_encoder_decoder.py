"""T5: scoring, generation and training agree with what transformers itself makes of encoder and decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from everedit.engine.attribution import attributions
from everedit.engine.gradients import module_gradients
from everedit.engine.tail import Tail
from everedit.evaluation.read import generate, read
from everedit.models.encoded_prompts import EncodedPrompts
from tests.support import facts
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

PAIRS = [(fact.prompt, fact.answer) for fact in facts.facts()[:12]]


def their_inputs(prompt: str, target: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a user of transformers would give: prompt and target tokenised by themselves."""
    tokenizer = shared("t5").tokenizer
    end = tokenizer.eos_token_id
    target_ids = [token for token in tokenizer(target).input_ids if token != end]
    return torch.tensor([tokenizer(prompt).input_ids]), torch.tensor([target_ids])


def test_readings_are_transformers_own_losses_in_a_batch_as_alone() -> None:
    lm = shared("t5")
    found = read(lm, PAIRS)
    assert len({len(lm.encode(prompt).ids) for prompt, _ in PAIRS}) > 1
    for (prompt, target), reading in zip(PAIRS, found, strict=True):
        source, labels = their_inputs(prompt, target)
        with torch.no_grad():
            theirs = lm.model(input_ids=source, labels=labels)
        assert reading.nll == pytest.approx(float(theirs.loss), abs=1e-4)
        assert list(reading.predicted) == theirs.logits[0].argmax(-1).tolist()
        assert list(reading.target) == labels[0].tolist()


def test_it_knows_its_facts_and_says_them_freely() -> None:
    lm = shared("t5")
    said = generate(lm, [prompt for prompt, _ in PAIRS], [target for _, target in PAIRS])
    right = [text.strip().startswith(target) for text, (_, target) in zip(said, PAIRS, strict=True)]
    assert sum(right) >= 11


def test_continuations_are_transformers_greedy_search() -> None:
    lm = shared("t5")
    rows = [lm.encode(prompt).ids for prompt, _ in PAIRS]
    prompts = EncodedPrompts.of(lm, rows)
    stops = torch.zeros(len(rows), lm.model.config.vocab_size, dtype=torch.bool)
    stops[:, lm.tokenizer.eos_token_id] = True
    found = prompts.continuations(torch.arange(len(rows)), torch.full((len(rows),), 6), stops)
    assert found == lm.generate_ids(rows, max_new_tokens=6)
    for row, new in zip(rows[:3], found[:3], strict=True):
        assert lm.generate_ids([row], max_new_tokens=6) == [new]


def test_gradients_are_those_of_the_weights() -> None:
    lm = shared("t5")
    texts = [lm.encode(*pair) for pair in PAIRS[:4]]
    name = lm.layout.mlp_out_weight(1)
    inputs, gradients = module_gradients(lm, texts, {name: lm.layout.module_of(name)})[name]
    weight = lm.layout.module_of(name).weight.requires_grad_()
    try:
        loss = torch.cat(
            [
                F.cross_entropy(lm.model(input_ids=s, labels=y).logits[0], y[0], reduction="none")
                for s, y in (their_inputs(*pair) for pair in PAIRS[:4])
            ]
        ).mean()
        (whole,) = torch.autograd.grad(loss, [weight])
    finally:
        weight.requires_grad_(False)
    assert whole.abs().max() > 0
    assert torch.allclose(gradients.T @ inputs, whole, atol=1e-5)


def test_a_tail_runs_the_whole_model() -> None:
    lm = shared("t5")
    texts = [lm.encode(*pair) for pair in PAIRS[:5]]
    mean = sum(reading.nll for reading in read(lm, PAIRS[:5])) / 5
    assert float(Tail.of(lm, texts, 2).loss()) == pytest.approx(mean, abs=1e-4)


def test_attributions_of_the_last_layer_are_a_plain_riemann_sum() -> None:
    lm = shared("t5")
    prompt, answer = PAIRS[0]
    source, labels = their_inputs(prompt, answer)
    token, last = int(labels[0, 0]), lm.layout.n_layers - 1
    found, activations = attributions(lm, lm.encode(prompt).ids, token, 5)
    start = torch.tensor([[lm.model.config.decoder_start_token_id]])
    slopes = []
    for step in range(1, 6):
        scaled = (activations[last] * step / 5).requires_grad_()
        handle = lm.layout.mlp_out(last).register_forward_pre_hook(lambda _, args, s=scaled: (s.view_as(args[0]),))
        try:
            chance = lm.model(input_ids=source, decoder_input_ids=start).logits[0, -1].softmax(-1)[token]
        finally:
            handle.remove()
        slopes.append(torch.autograd.grad(chance, scaled)[0])
    assert torch.allclose(found[last], activations[last] * torch.stack(slopes).mean(0), atol=1e-5)
    assert found[last].abs().max() > 1e-4


@pytest.mark.parametrize("method", ["ft-l", "kn", "mend", "serac"])
def test_methods_edit_it_and_go_back(method: str, corpus_path: Path) -> None:
    editor = make_editor("t5", corpus_path, method)
    before, edit = bits(editor.lm), home_town(0)
    unedited = losses(editor.lm, [edit])[0]
    with editor.trial(edit, score=False):
        assert losses(editor.lm, [edit])[0] < unedited - 1
        assert editor.ask(edit.prompt, max_new_tokens=6).base != ""
    assert same_bits(editor.lm, before)
    assert losses(editor.lm, [edit])[0] == unedited
