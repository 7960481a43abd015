"""MEND: its networks against the paper's formula row by row, its factors and outer gradients against whole weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Probe
from everedit.engine.hyper import GradientTransform
from everedit.engine.tail import Tail
from everedit.errors import EditError, NumericalError
from everedit.methods._trained import edit_gradients
from everedit.methods._transform import TransformLearner
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import LowRank
from tests.support import facts
from tests.support.editing import home_town, losses, probes
from tests.support.gradients import Pairs, pairs_by_hand, weight_gradients
from tests.support.loading import bits, edit_of, fresh, hooks_left, probe_of, same_bits, shared
from tests.support.transforms import (
    dense,
    editor_with,
    outer_loss,
    pseudo_pairs,
    rows_by_network,
    same,
    shaken,
    untrained,
)

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "llama", "opt", "gemma3_text", "t5"]
TABLE = facts.facts()
# Prompts of several lengths, targets of one, two and three tokens.
EDITS = [home_town(7, "Lisbon"), edit_of(TABLE[4], "New Delhi"), edit_of(TABLE[53], "Buenos Aires piano")]
EXAMPLES = [edit_of(TABLE[0], "New Delhi", locality=(probe_of(TABLE[70]),)), home_town(7, "Oslo", locality=probes())]
IDENTITY = {"rank": 8, "normalise": False, "step": 0.3}


def learner_of(lm: LanguageModel, **settings: Any) -> TransformLearner:
    learner = untrained(lm, "mend", **{"rank": 8, **settings})
    assert isinstance(learner, TransformLearner)
    return learner


# --------------------------------------------------------------------------- the gradient's factors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outer_products_of_inputs_and_gradients_are_the_weights_gradients(family: str) -> None:
    lm, layer = shared(family), 1
    names = [name for each in (1, 2) for name in (*lm.layout.mlp_in_weights(each), lm.layout.mlp_out_weight(each))]
    texts = [lm.encode(edit.prompt, edit.target_new) for edit in EDITS]
    pairs = edit_gradients(Tail.of(lm, texts, layer), names)
    same({name: delta.T @ u for name, (u, delta) in pairs.items()}, weight_gradients(lm, EDITS, names))
    # What is padding, or comes too late to matter, has no row.
    for u, delta in pairs.values():
        assert bool((u != 0).any(1).all())
        assert bool((delta != 0).any(1).all())
    lasts = [lm.layout.mlp_out_weight(each) for each in (1, lm.layout.n_layers - 1)]
    counts = [len(u) for u, _ in edit_gradients(Tail.of(lm, texts, layer), lasts).values()]
    targets = sum(len(text.target_ids) for text in texts)
    assert counts == ([sum(len(text.ids) - 1 for text in texts), targets] if family != "t5" else [targets] * 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_editor_makes_a_step_of_each_weights_own_size_down_its_gradient(
    family: str, corpus_path: Path, tmp_path: Path
) -> None:
    lm = fresh(family)
    learner = learner_of(lm, **IDENTITY)
    learner.steps.data = torch.linspace(0.01, 0.3, len(learner.names))
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    # The last three layers are edited: both projections of each, or three.
    layers = range(max(0, lm.layout.n_layers - 3), lm.layout.n_layers)
    assert editor.method.weights(lm.layout) == learner.names
    assert {name.split(".mlp")[0].split(".fc")[0].split(".layer.2")[0] for name in learner.names} == {
        f"{lm.layout.family.blocks}.{layer}" for layer in layers
    }
    step = dict(zip(learner.names, learner.steps.tolist(), strict=True))
    for edits in (EDITS[2:], EDITS):
        gradients = weight_gradients(lm, edits, learner.names)
        same(dense(editor, edits), {name: -step[name] * gradient for name, gradient in gradients.items()})
    # The next edit's gradient is taken on the weights as they are now.
    editor.edit(EDITS[0], score=False)
    gradients = weight_gradients(lm, EDITS[1:2], learner.names)
    same(dense(editor, EDITS[1:2]), {name: -step[name] * gradient for name, gradient in gradients.items()})
    with editor.unedited():
        others = weight_gradients(lm, EDITS[1:2], learner.names)
    assert all((others[name] - gradient).norm() > 0.01 * gradient.norm() for name, gradient in gradients.items())


# --------------------------------------------------------------------------- the networks


def changes_by_hand(learner: TransformLearner, pairs: Pairs, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """-alpha_l times the sum over rows of delta~ u~^T."""
    found = {}
    for step, (name, (pseudo_u, pseudo_delta)) in zip(
        learner.steps, pseudo_pairs(learner, pairs, seen).items(), strict=True
    ):
        rows = zip(pseudo_delta, pseudo_u, strict=True)
        found[name] = -step.double() * torch.stack([torch.outer(delta, u) for delta, u in rows]).sum(0)
    return found


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {}), ("llama", {}), ("llama", {"shared": False, "blocks": 1}), ("t5", {"normalise": False})],
)
def test_edits_are_the_papers_formula_row_by_row_in_any_order(
    family: str, settings: dict[str, Any], corpus_path: Path, tmp_path: Path
) -> None:
    lm = shared(family)
    learner, seen = shaken(learner_of(lm, layers=(1, 2), **settings)), {}
    if learner.config.normalise:
        # What was seen in training, in two passes, is what counts.
        passes = [pairs_by_hand(lm, EDITS, learner.names), pairs_by_hand(lm, EXAMPLES, learner.names)]
        with torch.no_grad():
            for pairs in passes:
                learner.train().changes(pairs)
        both = [rows_by_network(learner, pairs) for pairs in passes]
        seen = {key: torch.cat([one[key] for one in both]) for key in learner.networks}
    editor = editor_with(learner.eval(), corpus_path, tmp_path / "net")
    edits = [edit_of(fact) for fact in TABLE[20:26:2]]
    expected = changes_by_hand(learner, pairs_by_hand(lm, edits, learner.names), seen)
    same(dense(editor, edits), expected)
    same(dense(editor, edits[::-1]), expected)
    # They are no multiple of the gradient.
    gradients = weight_gradients(lm, edits, learner.names)
    for name, change in expected.items():
        assert abs(F.cosine_similarity(change.flatten(), gradients[name].double().flatten(), dim=0).item()) < 0.99


def test_networks_are_shared_by_weights_of_a_shape_or_not_at_all() -> None:
    lm = shared("llama")
    learner = learner_of(lm)
    assert learner.networks.keys() == {"64x256", "256x64"}
    assert [len(learner.networks[key].scale[0]) for key in ("64x256", "256x64")] == [6, 3]
    alone = learner_of(lm, shared=False)
    assert [len(network.scale[0]) for network in alone.networks.values()] == [1] * 9
    first, second, *_ = (network.right[0] for network in alone.networks.values())
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert torch.equal(learner_of(lm).networks["64x256"].right[0], learner.networks["64x256"].right[0])


def test_a_new_network_is_the_identity_and_yet_learns() -> None:
    random = torch.Generator().manual_seed(0)
    network = GradientTransform(5, 3, 2, rank=4, blocks=2, seed=0)
    u, delta, numbers = (
        torch.randn(20, 5, generator=random),
        torch.randn(20, 3, generator=random),
        torch.tensor([0, 1] * 10),
    )
    plain = network.eval()(u, delta, numbers, normalise=False)
    assert torch.equal(torch.cat(plain, 1), torch.cat([u, delta], 1))
    found = torch.cat(network.train()(u, delta, numbers), 1)
    assert torch.equal(found, network.normalised(torch.cat([u, delta], 1)))
    found.pow(2).sum().backward()
    for left in network.left:
        assert bool((left.grad.abs().sum(0) > 0).all())
    assert GradientTransform(5, 3, 1, rank=1920, blocks=1, seed=0).left[0].shape == (8, 8)


def test_statistics_are_those_of_all_rows_met_in_training_and_of_no_other() -> None:
    random = torch.Generator().manual_seed(3)
    rows = torch.cat([torch.randn(57, 8, generator=random) * 10.0 ** torch.arange(-6, 2), torch.zeros(3, 8)])
    network = GradientTransform(5, 3, 1, rank=2, blocks=1, seed=0)
    numbers = torch.zeros(60, dtype=torch.long)
    # Before there are two rows nothing is known of their spread.
    assert torch.equal(network.normalised(rows), rows)
    network.observe(rows[:1])
    assert torch.equal(network.normalised(rows), rows)
    for part in (slice(1, 4), slice(4, 30), slice(30, 31), slice(31, 60)):
        network.train()(rows[part, :5], rows[part, 5:], numbers[part])
    wide = rows.double()
    expected = (wide - wide.mean(0)) / (wide.std(0) + 1e-7)
    torch.testing.assert_close(network.normalised(rows).double(), expected, rtol=1e-5, atol=1e-5)
    before = {name: part.clone() for name, part in network.state_dict().items()}
    network.eval()(100 * rows[:, :5], rows[:, 5:], numbers)
    assert all(torch.equal(before[name], part) for name, part in network.state_dict().items())
    assert {"mean", "squares", "count"} <= before.keys()
    other = GradientTransform(5, 3, 1, rank=2, blocks=1, seed=9)
    other.load_state_dict(before)
    assert torch.equal(other.normalised(rows), network.normalised(rows))


# --------------------------------------------------------------------------- training


def shrunk(learner: TransformLearner, changes: Mapping[str, Tensor]) -> None:
    """Bring the changes to a third of the weights by their step sizes."""
    for number, (name, change) in enumerate(changes.items()):
        learner.steps.data[number] *= oriented(learner.lm.layout.module_of(name)).norm() / 3 / change.norm().detach()


@pytest.mark.parametrize(
    ("family", "settings"),
    [("gpt2", {}), ("llama", {"c_edit": 0.3, "c_loc": 2.0}), ("opt", {"normalise": False}), ("t5", {})],
)
def test_the_outer_loss_and_its_gradients_are_those_of_whole_edited_weights(
    family: str, settings: dict[str, Any]
) -> None:
    lm = fresh(family)
    before = bits(lm)
    learner = shaken(learner_of(lm, layers=(1, 2), **settings)).train()
    # Changes beside which the weights are still seen: behind a norm the length of larger ones would not matter.
    pairs = pairs_by_hand(lm, EXAMPLES, learner.names)
    shrunk(learner, changes_by_hand(learner, pairs, rows_by_network(learner, pairs)))
    loss, figures = learner(EXAMPLES)
    loss.backward()
    gradients = {name: weight.grad for name, weight in learner.named_parameters()}
    changes = changes_by_hand(learner, pairs, rows_by_network(learner, pairs))
    likely, apart = outer_loss(lm, EXAMPLES, changes)
    expected = learner.config.c_edit * likely + learner.config.c_loc * apart
    assert (figures["nll"], figures["kl"], loss.item(), figures["loss"]) == pytest.approx(
        (likely.item(), apart.item(), expected.item(), expected.item()), rel=1e-3
    )
    assert min(likely.item(), apart.item()) > 0.01
    wanted = torch.autograd.grad(expected, list(learner.parameters()))
    for (name, gradient), other in zip(gradients.items(), wanted, strict=True):
        assert gradient is not None
        assert (gradient - other).norm() < 5e-3 * other.norm() + 1e-7, name
    assert sum(other.norm() > 0 for other in wanted) > 0.9 * len(wanted)
    assert same_bits(lm, before)
    assert all(weight.grad is None and not weight.requires_grad for weight in lm.model.parameters())
    assert hooks_left(lm) == []


def test_with_step_sizes_of_zero_nothing_changes(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("llama")
    learner, before = shaken(learner_of(lm)), bits(lm)
    learner.steps.data.zero_()
    with torch.no_grad():
        figures = learner(EXAMPLES)[1]
    assert abs(figures["kl"]) < 1e-6
    assert (figures["locality"], figures["loss"]) == (1.0, pytest.approx(learner.config.c_edit * figures["nll"]))
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    unedited = losses(lm, EDITS)
    [commit] = editor.edit(EDITS, score=False).commits
    assert commit.norm == 0
    assert same_bits(lm, before)
    assert losses(lm, EDITS) == unedited


def test_what_is_learned_holds_for_edits_never_seen() -> None:
    lm = shared("llama")
    towns = [home_town(person, locality=probes()) for person in range(24)]
    train, held_out = towns[:18], towns[18:]
    learner = learner_of(lm, rank=32, lr=1e-3, c_edit=1.0)
    assert [group["lr"] for group in learner.groups()] == [1e-3, learner.config.step_lr]
    optimiser, found = learner.optimiser(), []
    for step in range(73):
        if step % 36 == 0:
            learner.eval()
            with torch.no_grad():
                found.append([learner([edit])[1]["loss"] for edit in held_out])
        optimiser.zero_grad()
        learner.train()
        learner([train[step % len(train)]])[0].backward()
        optimiser.step()
    means = [sum(values) / len(values) for values in found]
    # How steadily depends on the tiny model, which is trained where the test runs.
    assert min(means[1:]) < 0.5 * means[0]
    assert max(means[1:]) < 0.8 * means[0]


# --------------------------------------------------------------------------- what it is given


def test_ten_thousand_identical_edits_are_one_step_down_the_gradient(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("gpt2")
    learner = learner_of(lm, **IDENTITY, layers=(3,))
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    one = dense(editor, EDITS[:1])
    [commit] = editor.edit([EDITS[0]] * 10_000, score=False).commits
    same({name: delta.dense() for name, delta in commit.patch.deltas.items()}, one)
    # As factors they would take more room than the weight itself.
    assert not any(isinstance(delta, LowRank) for delta in commit.patch.deltas.values())


def test_parts_of_a_large_batch_weigh_as_their_tokens_do(corpus_path: Path, tmp_path: Path) -> None:
    lm = shared("llama")
    editor = editor_with(learner_of(lm, **IDENTITY, layers=(3,)), corpus_path, tmp_path / "net")
    edits = [
        edit_of(fact, target)
        for fact, target in zip(TABLE[:70], ["Buenos Aires piano"] * 64 + ["Oslo"] * 6, strict=True)
    ]
    step = editor.method.config.step  # type: ignore[attr-defined]
    gradients = weight_gradients(lm, edits, editor.method.weights(lm.layout))
    same(dense(editor, edits), {name: -step * gradient for name, gradient in gradients.items()})


def test_what_cannot_be_an_example_or_an_edit_is_refused_and_loses_nothing(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("llama")
    learner, before = learner_of(lm), bits(lm)
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    bare = EXAMPLES[0].model_copy(update={"locality": ()})
    far = EXAMPLES[0].model_copy(update={"locality": (Probe(prompt="word " * 200, answer="x"),)})
    for example, message in (
        (bare, "no locality probe, and training needs one"),
        (far, "the model's context holds 128"),
    ):
        with pytest.raises(EditError if example is bare else ValueError, match=message):
            editor.method.check_example(editor.bench, example)  # type: ignore[attr-defined]
    editor.method.check_example(editor.bench, EXAMPLES[0])  # type: ignore[attr-defined]
    learner.steps.data.fill_(float("nan"))
    broken = editor_with(learner, corpus_path, tmp_path / "broken")
    with pytest.raises(NumericalError, match="not finite; nothing was written"):
        broken.edit(EDITS, score=False)
    assert same_bits(lm, before)
