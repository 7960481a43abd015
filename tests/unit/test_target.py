"""The value optimisation against its plain form: whole rows, whole model, all logits, torch's own Adam."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.descent import Strides
from everedit.engine.target import Target, TargetConfig, optimise_targets
from everedit.errors import EditError, NumericalError, TokenError
from everedit.models import LanguageModel, load_model
from everedit.models.packaged import ALIASES
from tests.oracles import PlainTarget, plain_target
from tests.support import facts
from tests.support.loading import DECODERS, bits, edit_of, fresh, hooks_left, same_bits, shared

SITES = ("block", "mlp")
# The last one is longer than the window of local attention.
PREFIXES = ["", facts.PREFIXES[0], facts.PREFIXES[3], facts.PREFIXES[1] + facts.PREFIXES[7] + facts.PREFIXES[4]]
CONFIG = TargetConfig(steps=8)
SLACK = 1e-4


def _edits(*picked: int) -> list[Edit]:
    return [edit_of(facts.facts()[index]) for index in picked]


# Targets of one word and of two, subjects of two to four words, in both halves of the table.
EDITS = _edits(0, 40, 81, 97, 11)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-9))


def _agree(found: Target, expected: PlainTarget) -> None:
    assert len(found.losses) == len(expected.losses)
    assert found.losses == pytest.approx(expected.losses, rel=SLACK, abs=SLACK)
    assert _distance(found.origin, expected.origin) <= SLACK
    assert _distance(found.delta, expected.delta) <= SLACK
    torch.testing.assert_close(found.value, found.origin + found.delta)


# ------------------------------------------------------------------ against the plain form


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", DECODERS)
def test_equals_the_plain_form_alone_and_in_a_batch(family: str, site: str) -> None:
    lm = shared(family)
    before = bits(lm)
    together = optimise_targets(lm, EDITS, PREFIXES, 1, CONFIG, site=site)
    assert len(together) == len(EDITS)
    for edit, found in zip(EDITS, together, strict=True):
        expected = plain_target(lm, edit, PREFIXES, 1, CONFIG, site)
        assert float(expected.delta.norm()) > 0.1 * float(expected.origin.norm())
        _agree(found, expected)
        _agree(optimise_targets(lm, [edit], PREFIXES, 1, CONFIG, site=site)[0], expected)
        assert found.losses[-1] < found.losses[0]
    assert hooks_left(lm) == []
    assert same_bits(lm, before)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("family", ["gpt2", "gptj", "opt", "gemma2"])
def test_every_layer(family: str, layer: int, site: str) -> None:
    """Behind the last block nothing is left to run but the final norm, and only a subject at the end is of use."""
    lm = shared(family)
    names = ("Corin Vane", "Mira Quell", "Orrin Pellow")
    edits = [Edit(prompt=f"Behold the house of {name}", subject=name, target_new="New Delhi") for name in names]
    for edit, found in zip(edits, optimise_targets(lm, edits, PREFIXES, layer, CONFIG, site=site), strict=True):
        _agree(found, plain_target(lm, edit, PREFIXES, layer, CONFIG, site))
        assert found.losses[-1] < found.losses[0]


def _stopping_some(lm: LanguageModel, edits: list[Edit], site: str, **settings: Any) -> TargetConfig:
    """Settings whose ``stop_loss`` half of the edits reach and the other half do not."""
    config = TargetConfig.model_validate({"stop_loss": 0.0, **settings})
    least = sorted(min(found.losses) for found in optimise_targets(lm, edits, PREFIXES, 1, config, site=site))
    middle = len(least) // 2
    return config.model_copy(update={"stop_loss": (least[middle - 1] + least[middle]) / 2})


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "llama", "gemma3_text"])
@pytest.mark.parametrize("descent", ["adam", "strides"])
def test_edits_of_a_batch_stop_one_by_one(family: str, site: str, descent: str) -> None:
    lm = shared(family)
    config = _stopping_some(lm, EDITS, site, steps=12, clamp=8.0, lr=0.3, descent=descent)
    found = optimise_targets(lm, EDITS, PREFIXES, 1, config, site=site)
    assert sum(target.losses[-1] < config.stop_loss for target in found) == 2
    assert len({len(target.losses) for target in found}) > 1
    for edit, target in zip(EDITS, found, strict=True):
        _agree(target, plain_target(lm, edit, PREFIXES, 1, config, site))
        assert target.losses[-1] < config.stop_loss or len(target.losses) == config.steps
        assert all(loss >= config.stop_loss for loss in target.losses[:-1])


@pytest.mark.parametrize(
    "config",
    [
        TargetConfig(steps=6, kl=0.0),
        TargetConfig(steps=6, kl=2.0, weight_decay=0.5),
        TargetConfig(steps=6, weight_decay=0.0, clamp=0.3),
        TargetConfig(steps=2),
        TargetConfig(steps=6, descent="strides", lr=0.2, stop_loss=0.0),
    ],
    ids=["no essence", "strong terms", "tight clamp", "one update", "strides"],
)
@pytest.mark.parametrize("edits", [EDITS[:1], EDITS], ids=["one", "batch"])
def test_every_term_of_the_loss(config: TargetConfig, edits: list[Edit]) -> None:
    lm = shared("gpt2")
    for edit, found in zip(edits, optimise_targets(lm, edits, PREFIXES, 1, config), strict=True):
        _agree(found, plain_target(lm, edit, PREFIXES, 1, config, "block"))
        ratio = float(found.delta.norm() / found.origin.norm())
        assert ratio <= config.clamp * (1 + 1e-5)
        if config.clamp < 1:
            assert ratio == pytest.approx(config.clamp)


def test_strides_have_one_length_whatever_the_gradients() -> None:
    """The first stride goes straight down, none is longer than its length, and where the gradient is 0 none is made."""
    steep, flat = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]), torch.tensor([[[3e-9, 4e-9]], [[0.0, 0.0]]])
    strides = Strides(steep, torch.tensor([[10.0], [10.0]]))
    first = strides.step(torch.zeros_like(steep), steep)
    torch.testing.assert_close(first, torch.tensor([[[-6.0, -8.0]], [[0.0, 0.0]]]))
    torch.testing.assert_close(strides.step(first, flat), 2 * first)
    strides.keep(torch.tensor([0]))
    back = strides.step(2 * first[:1], -steep[:1])
    assert 0 < float((back - 2 * first[:1]).norm()) < 10


def test_a_descent_comes_with_its_own_rate() -> None:
    """A published rate is Adam's: as the length of a stride it would be as far as the state is long."""
    published = {"lr": 1.0, "steps": 40}
    assert TargetConfig.merged(published, None).lr == 1.0
    strides = TargetConfig.merged(published, TargetConfig(descent="strides"))
    assert (strides.descent, strides.lr, strides.steps) == ("strides", 0.17, 40)
    assert TargetConfig.merged(published, TargetConfig(descent="strides", lr=0.3)).lr == 0.3
    assert TargetConfig.merged({"descent": "strides"}, None).lr == 0.17
    assert TargetConfig.merged({"descent": "strides"}, TargetConfig(descent="adam")).lr == 0.5


def test_products_of_bfloat16_find_nearly_the_same_vector() -> None:
    """What is rounded are factors, never the vector, its steps or the losses: a hundredth, where it is done at all."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor makes no products of bfloat16")
    lm = shared("llama")
    before = bits(lm)
    exact = optimise_targets(lm, EDITS, PREFIXES, 1, CONFIG)
    rounded = optimise_targets(lm, EDITS, PREFIXES, 1, CONFIG.model_copy(update={"products": "bfloat16"}))
    for one, other in zip(exact, rounded, strict=True):
        assert 1e-5 < _distance(other.delta, one.delta) < 0.1
        assert other.losses == pytest.approx(one.losses, rel=0.05, abs=0.02)
        assert other.delta.dtype == torch.float32
    assert same_bits(lm, before)
    assert hooks_left(lm) == []


def test_the_terms_of_the_loss_are_felt() -> None:
    """Were a weight ignored here and in the plain form alike, the results would not change with it."""
    lm = shared("llama")
    configs = (CONFIG, TargetConfig(steps=8, kl=5.0), TargetConfig(steps=8, weight_decay=50.0))
    first, *others = (optimise_targets(lm, EDITS[:1], PREFIXES, 1, config)[0].delta for config in configs)
    for other in others:
        assert _distance(other, first) > 0.01


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_a_subject_at_the_very_start_and_at_the_very_end(family: str) -> None:
    """Without anything before the subject there are no keys and values to read from a cache."""
    lm = shared(family)
    first = Edit(prompt="The home town of Corin Vane is", subject="The", target_new="Lima")
    end = Edit(prompt="This is the city of Corin Vane", subject="Corin Vane", target_new="New Delhi")
    assert lm.encode(first.prompt, subject="The").subject_last == (1 if family == "gemma2" else 0)
    for edits in ([first], [end], [first, end]):
        for edit, found in zip(edits, optimise_targets(lm, edits, [""], 1, CONFIG), strict=True):
            _agree(found, plain_target(lm, edit, [""], 1, CONFIG, "block"))


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "qwen3"])
def test_an_edits_companions_play_no_part(family: str, site: str) -> None:
    lm = shared(family)
    edits = _edits(3, 25, 60, 64, 90, 102, 117)
    config = _stopping_some(lm, edits, site, steps=6, clamp=0.8)  # so tight that every edit feels its own
    plain = optimise_targets(lm, edits, PREFIXES, 1, config, site=site)
    assert sum(target.losses[-1] < config.stop_loss for target in plain) == 3
    order = [4, 0, 6, 2, 5, 1, 3]
    shuffled = optimise_targets(lm, [edits[i] for i in order], PREFIXES, 1, config, site=site)
    twice = optimise_targets(lm, [edits[0], *edits], PREFIXES, 1, config, site=site)[1:]
    one_by_one = optimise_targets(lm, edits, PREFIXES, 1, config, site=site, tokens_a_batch=1)
    for others in ([shuffled[order.index(i)] for i in range(len(edits))], twice, one_by_one):
        for found, expected in zip(others, plain, strict=True):
            assert len(found.losses) == len(expected.losses)
            assert _distance(found.delta, expected.delta) <= SLACK
            assert found.probability == pytest.approx(expected.probability, rel=1e-3)


def test_the_probability_is_that_of_the_whole_target() -> None:
    """Checked by hand: add the vector to the block's output in a full forward, one context after the other."""
    lm = shared("gptj")
    edit = EDITS[3]
    target = optimise_targets(lm, [edit], PREFIXES, 1, CONFIG)[0]
    found = []
    for prefix in PREFIXES:
        row = lm.encode(edit.prompt, edit.target_new, subject=edit.subject, prefix=prefix)

        def add(_module: object, _args: object, output: tuple[Tensor, ...], at: int = row.subject_last) -> object:
            hidden = output[0].clone()
            hidden[0, at] += target.delta
            return (hidden, *output[1:])

        handle = lm.layout.block(1).register_forward_hook(add)
        with torch.no_grad():
            logs = lm.model(input_ids=torch.tensor([row.ids])).logits.log_softmax(-1)[0]
        handle.remove()
        said = [float(logs[i - 1, row.ids[i]]) for i in range(*row.target)]
        found.append(float(torch.tensor(said).mean().exp()))
    assert len(set(found)) == len(PREFIXES)
    assert target.probability == pytest.approx(sum(found) / len(found), rel=1e-3)


def test_no_edits_and_no_steps() -> None:
    lm = shared("gpt2")
    assert optimise_targets(lm, [], PREFIXES, 1, CONFIG) == []
    target = optimise_targets(lm, EDITS[:1], PREFIXES, 1, TargetConfig(steps=1))[0]
    assert torch.equal(target.delta, torch.zeros(64))
    assert len(target.losses) == 1


# ------------------------------------------------------------------ what is left behind, what is refused


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_weights_and_generators_are_left_alone(family: str) -> None:
    lm, state = fresh(family), torch.get_rng_state()
    names = dict(lm.model.named_parameters())
    lm.layout.mlp_out(0).weight.requires_grad_(True)
    before = {name: weight.requires_grad for name, weight in names.items()}
    assert sum(before.values()) == 1
    optimise_targets(lm, EDITS[:2], PREFIXES, 1, CONFIG)
    assert {name: weight.requires_grad for name, weight in names.items()} == before
    assert all(weight.grad is None for weight in names.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert not lm.model.training


@pytest.mark.parametrize("site", SITES)
def test_a_loss_that_is_not_finite(site: str) -> None:
    lm = shared("gpt2")
    with pytest.raises(NumericalError, match="loss that is not finite") as caught:
        optimise_targets(lm, EDITS[:2], PREFIXES, 1, TargetConfig(lr=1e38, clamp=1e38), site=site)
    assert "lr" in caught.value.fix
    assert hooks_left(lm) == []
    broken = fresh("gpt2")
    broken.model.transformer.h[3].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError):
        optimise_targets(broken, EDITS[:1], PREFIXES, 1, CONFIG, site=site)
    assert hooks_left(broken) == []


def test_an_edit_without_a_subject_or_too_long() -> None:
    lm = shared("gpt2")
    with pytest.raises(EditError, match="the edit names none"):
        optimise_targets(lm, [Edit(prompt="Corin Vane lives in", target_new="Oslo")], PREFIXES, 1, CONFIG)
    with pytest.raises(TokenError, match="the model's context holds 128"):
        optimise_targets(lm, EDITS[:1], ["", "all " * 130], 1, CONFIG)


def test_half_precision_gives_float32_vectors() -> None:
    whole, half = shared("llama"), shared("llama", "bfloat16")
    for site in SITES:
        expected = optimise_targets(whole, EDITS[:2], PREFIXES, 1, CONFIG, site=site)
        for found, other in zip(
            optimise_targets(half, EDITS[:2], PREFIXES, 1, CONFIG, site=site), expected, strict=True
        ):
            assert found.delta.dtype == found.origin.dtype == torch.float32
            assert _distance(found.origin, other.origin) < 0.05
            assert found.losses[-1] == pytest.approx(other.losses[-1], rel=0.2)


# ------------------------------------------------------------------ a real model


@cache
def _real() -> LanguageModel:
    return load_model("smollm2-135m", device="cpu")


@pytest.mark.real
@pytest.mark.skipif(not ALIASES["smollm2-135m"].is_installed, reason=ALIASES["smollm2-135m"].install)
@pytest.mark.parametrize("site", SITES)
def test_a_real_model(site: str) -> None:
    lm, prefixes = _real(), ["", "I think that. "]
    edits = [
        Edit(prompt="The capital of France is", subject="France", target_new="the city of Lyon"),
        Edit(prompt="The Eiffel Tower is in", subject="The Eiffel Tower", target_new="Rome"),
    ]
    config = TargetConfig(steps=4)
    for edit, found in zip(edits, optimise_targets(lm, edits, prefixes, 5, config, site=site), strict=True):
        expected = plain_target(lm, edit, prefixes, 5, config, site)
        assert expected.losses[-1] < expected.losses[0]
        _agree(found, expected)
    assert hooks_left(lm) == []
