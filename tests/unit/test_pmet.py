"""PMET's two vectors against a plain optimisation of whole forwards, and its walk against the equations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.engine.state import State
from everedit.engine.target import Target, TargetConfig, optimise_targets
from everedit.errors import NumericalError
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from tests.support import facts
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import bits, edit_of, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "gptj", "llama", "gemma2"]  # one after the other, side by side, gated, with norms behind both
PREFIXES = ["", facts.PREFIXES[0], facts.PREFIXES[3]]
EDITS = [edit_of(facts.facts()[index]) for index in (0, 40, 81, 97)]
CONFIG = TargetConfig(steps=7, lr=0.3, weight_decay=0.5, clamp=0.9, kl=0.5)
SITE = "attention+mlp"


@dataclass
class Plain:
    origins: Tensor  # (2, H): the attention's and the MLP's
    deltas: Tensor
    losses: list[float]
    said: list[bool]


def plain_pmet(lm: LanguageModel, edit: Edit, prefixes: Sequence[str], layer: int, config: TargetConfig) -> Plain:
    """Whole rows through the whole model at every step, two hooks that add the two vectors, and torch's own Adam."""
    texts = [lm.encode(edit.prompt, edit.target_new, subject=edit.subject, prefix=prefix) for prefix in prefixes]
    essence = lm.encode(f"{edit.subject} is a", subject=edit.subject)
    rows = [[*text.ids[:-1]] for text in texts] + [[*essence.ids]]
    last = [text.subject_last for text in (*texts, essence)]
    batch, lines = lm.pad(rows), torch.arange(len(rows))
    deltas = [torch.zeros(lm.layout.hidden_size, requires_grad=True) for _ in range(2)]
    origins: dict[int, Tensor] = {}

    def adding(index: int) -> Any:
        def hook(_: Any, __: Any, output: Tensor) -> Tensor:
            whole = output.reshape(*batch.ids.shape, -1).clone()
            # The first pass, without any vectors, shows what stands there behind the empty prefix.
            origins.setdefault(index, whole[0, last[0]].detach().clone())
            whole[lines, last] = whole[lines, last] + deltas[index]
            return whole.view_as(output)

        return hook

    modules = lm.layout.attention_out(layer), lm.layout.mlp_out(layer)
    handles = [module.register_forward_hook(adding(index)) for index, module in enumerate(modules)]
    optimiser = torch.optim.Adam(deltas, lr=config.lr)
    losses: list[float] = []
    said: list[bool] = []
    initial: Tensor | None = None
    try:
        for step in range(config.steps):
            optimiser.zero_grad()
            with torch.enable_grad():
                logs = F.log_softmax(lm.model(**batch.inputs(), use_cache=False).logits.float(), dim=-1)
                nlls, first_choice = [], True
                for line, text in enumerate(texts):
                    found = logs[line, text.prompt_end - 1 : len(text.ids) - 1]
                    labels = torch.tensor(text.target_ids)
                    nlls.append(F.nll_loss(found, labels))
                    first_choice &= bool((found.argmax(-1) == labels).all())
                now = logs[-1, last[-1]]
                initial = now.detach() if initial is None else initial
                divergence = (now.exp() * (now - initial)).sum()
                decay = sum(d.norm() / origins[i].norm() ** 2 for i, d in enumerate(deltas))
                # The weight follows what was said one step before.
                weight = 0.1 if config.ease and said and said[-1] else 1.0
                loss = weight * torch.stack(nlls).mean() + config.kl * divergence + config.weight_decay * decay
            losses.append(float(loss.detach()))
            said.append(first_choice)
            near = config.ease and first_choice and float(config.kl * divergence.detach()) <= 0.01
            if losses[-1] < config.stop_loss or near or step == config.steps - 1:
                break
            loss.backward()
            optimiser.step()
            for index, delta in enumerate(deltas):
                limit = config.clamp * origins[index].norm()
                if delta.detach().norm() > limit:
                    delta.data *= limit / delta.detach().norm()
    finally:
        for handle in handles:
            handle.remove()
    return Plain(torch.stack([origins[0], origins[1]]), torch.stack([d.detach() for d in deltas]), losses, said)


def agree(found: Target, expected: Plain) -> None:
    assert len(found.losses) == len(expected.losses)
    assert found.losses == pytest.approx(expected.losses, rel=1e-3, abs=1e-3)
    torch.testing.assert_close(found.origin, expected.origins[1], rtol=1e-3, atol=1e-4)
    assert float((found.delta - expected.deltas[1]).norm()) <= 2e-3 * float(expected.deltas[1].norm())
    torch.testing.assert_close(found.value, found.origin + found.delta)


# --------------------------------------------------------------------------- the two vectors


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_both_vectors_are_optimised_as_in_whole_forwards_alone_and_in_a_batch(family: str, layer: int) -> None:
    lm = shared(family)
    assert isinstance(lm.blocks_return_tuples, bool)  # found out here; the next test leaves it to the optimisation
    before, generator = bits(lm), torch.get_rng_state()
    # Behind the last block only what is said at the subject's end can still change.
    edits = [home_town(person) for person in (0, 16, 24)] if layer == 3 else EDITS
    together = optimise_targets(lm, edits, PREFIXES, layer, CONFIG, site=SITE)
    assert len(together) == len(edits)
    for edit, found in zip(edits, together, strict=True):
        expected = plain_pmet(lm, edit, PREFIXES, layer, CONFIG)
        assert all(
            float(d.norm()) > 0.1 * float(o.norm()) for d, o in zip(expected.deltas, expected.origins, strict=True)
        )
        agree(found, expected)
        agree(optimise_targets(lm, [edit], PREFIXES, layer, CONFIG, site=SITE)[0], expected)
    assert hooks_left(lm) == []
    assert same_bits(lm, before)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_optimisation_may_be_the_first_thing_that_a_model_does(layer: int) -> None:
    [found] = optimise_targets(fresh("llama"), EDITS[:1], PREFIXES, layer, CONFIG, site=SITE)
    agree(found, plain_pmet(shared("llama"), EDITS[0], PREFIXES, layer, CONFIG))


@pytest.mark.parametrize(
    "settings",
    [{"clamp": 0.1}, {"clamp": 50.0, "weight_decay": 0.0}, {"weight_decay": 20.0}, {"kl": 0.0}, {"kl": 5.0}],
    ids=str,
)
def test_every_term_and_the_clamp_of_each_vector(settings: dict[str, float]) -> None:
    lm = shared("gpt2")
    config = CONFIG.model_copy(update=settings)
    plain = plain_pmet(lm, EDITS[1], PREFIXES, 1, config)
    [found] = optimise_targets(lm, EDITS[1:2], PREFIXES, 1, config, site=SITE)
    agree(found, plain)
    ratios = [float(d.norm() / o.norm()) for d, o in zip(plain.deltas, plain.origins, strict=True)]
    if config.clamp < CONFIG.clamp:
        # Each is held to its own size, and here both reach it.
        assert ratios == pytest.approx([config.clamp] * 2)
        assert float(found.delta.norm() / found.origin.norm()) == pytest.approx(config.clamp, rel=1e-4)
    usual = optimise_targets(lm, EDITS[1:2], PREFIXES, 1, CONFIG, site=SITE)[0]
    assert float((usual.delta - found.delta).norm()) > 1e-2 * float(usual.delta.norm())


def test_the_attentions_vector_takes_its_share() -> None:
    lm = shared("gpt2")
    config = CONFIG.model_copy(update={"kl": 0.0, "weight_decay": 0.0, "steps": 4})
    two = optimise_targets(lm, EDITS[:1], [""], 1, config, site=SITE)[0]
    one = optimise_targets(lm, EDITS[:1], [""], 1, config, site="mlp")[0]
    torch.testing.assert_close(two.origin, one.origin)
    assert two.losses[0] == pytest.approx(one.losses[0], rel=1e-4)
    assert float((two.delta - one.delta).norm()) > 1e-2 * float(one.delta.norm())


# --------------------------------------------------------------------------- the rule that eases


# Their subjects end the prompt, so that one layer can make a model say anything.
EASY = [home_town(person) for person in (0, 10, 17)]


@cache
def eased(kl: float) -> tuple[TargetConfig, tuple[Plain, ...]]:
    config = TargetConfig(steps=20, lr=0.1, weight_decay=0.1, clamp=6.0, kl=kl, stop_loss=0.0, ease=True)
    return config, tuple(plain_pmet(shared("gpt2"), edit, PREFIXES[:2], 1, config) for edit in EASY)


@pytest.mark.parametrize("kl", [0.0, 0.0018, 0.5])
def test_once_the_target_is_said_its_loss_counts_a_tenth_and_little_divergence_ends_it(kl: float) -> None:
    lm = shared("gpt2")
    config, plain = eased(kl)
    together = optimise_targets(lm, EASY, PREFIXES[:2], 1, config, site=SITE)
    for edit, found, expected in zip(EASY, together, plain, strict=True):
        [alone] = optimise_targets(lm, [edit], PREFIXES[:2], 1, config, site=SITE)
        for target in (found, alone):
            # A loss that is cut to a tenth one step too early or too late would show.
            assert target.losses == pytest.approx(expected.losses, rel=5e-3, abs=5e-3)
    lengths = [len(run.losses) for run in plain]
    if kl == 0.0:
        # Without a divergence to wait for, the first step that says the target is the last one.
        assert all(run.said.index(True) == len(run.said) - 1 > 0 for run in plain)
        assert len(set(lengths)) > 1
    elif kl < 0.1:
        # Some end at once, others go on with a tenth of the loss.
        assert min(lengths) < config.steps == max(lengths)
    else:
        # Said, and still too far from what the subject was; what is said can be lost again and then counts in full.
        assert set(lengths) == {config.steps}
        assert any(True in run.said and False in run.said[run.said.index(True) :] for run in plain)


def test_without_the_rule_an_edit_goes_on() -> None:
    lm = shared("gpt2")
    config, plain = eased(0.0)
    on = optimise_targets(lm, EASY, PREFIXES[:2], 1, config.model_copy(update={"ease": False}), site=SITE)
    assert all(len(target.losses) == config.steps for target in on)
    assert max(len(run.losses) for run in plain) < config.steps


def test_what_is_said_already_needs_no_vector() -> None:
    lm, fact = shared("gpt2"), facts.facts()[40]
    config, _ = eased(0.0)
    [found] = optimise_targets(lm, [edit_of(fact, fact.answer)], [""], 1, config, site=SITE)
    assert len(found.losses) == 1
    assert float(found.delta.norm()) == 0.0


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    lm = shared("gpt2")
    with pytest.raises(NumericalError, match="not finite"):
        optimise_targets(lm, EDITS[:2], PREFIXES, 1, TargetConfig(lr=1e38, clamp=1e38), site=SITE)
    assert hooks_left(lm) == []


# --------------------------------------------------------------------------- the walk through the layers


def read(lm: LanguageModel, layer: int, edit: Edit, prefix: str = "") -> tuple[Tensor, Tensor]:
    """Key and value of a layer at the last token of prefix and prompt, by a whole forward."""
    seen: list[Tensor] = []

    def hook(_: Any, args: Any, output: Tensor) -> None:
        seen.extend(part.reshape(-1, part.shape[-1])[-1].detach().clone().double() for part in (args[0], output))

    handle = lm.layout.mlp_out(layer).register_forward_hook(hook)
    lm.model(torch.tensor([lm.tokenizer(prefix + edit.prompt)["input_ids"]]), use_cache=False)
    handle.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("share", ["sqrt", "equal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gap_of_the_mlps_output_is_spread_by_roots(family: str, share: str, corpus_path: Path) -> None:
    """R_l = (V - W k) / sqrt(layers left), solved as MEMIT does, on a copy whose weights are really written."""
    edits, layers, weight = [home_town(person) for person in (0, 10, 20)], (0, 1, 2), 3.0
    settings = {**METHOD_SETTINGS["pmet"], "layers": layers, "moment_weight": weight}
    settings |= {"target": {"steps": 6, "kl": 0.0}} | ({"share": share} if share == "equal" else {})
    editor = make_editor(shared(family), corpus_path, "pmet", method_settings=settings)
    editor.prepare()
    targets = editor.method.targets(editor.bench, edits)
    patch, state = editor.method.fit(editor.bench, edits, State(), targets)
    assert state == State()
    lm, prefixes = fresh(family), editor.method.prefixes(editor.bench)
    assert len(prefixes) > 1
    for index, layer in enumerate(layers):
        left = len(layers) - index
        k = torch.stack(
            [
                keys[0] / 2 + keys[1:].mean(0) / 2
                for edit in edits
                for keys in [torch.stack([read(lm, layer, edit, prefix)[0] for prefix in prefixes])]
            ],
            dim=1,
        )
        gap = torch.stack([t.value.double() - read(lm, 2, e)[1] for t, e in zip(targets, edits, strict=True)], dim=1)
        r = gap / (left**0.5 if share == "sqrt" else left)
        held = editor.bench.moments.get([layer])[layer]
        c = held.matrix + held.ridge * held.matrix.diagonal().mean() * torch.eye(len(held.matrix)).double()
        expected = r @ k.T @ torch.linalg.inv(weight * c + k @ k.T)
        found = patch.deltas[lm.layout.mlp_out_weight(layer)].dense().double()
        assert float(expected.norm()) > 1e-3
        assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
        oriented(lm.layout.mlp_out(layer)).add_(expected.float())
    assert len(patch.deltas) == len(layers)
