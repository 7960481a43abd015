"""KE: gate and shift against whole gradients, the condition read by hand, and a multiplier that keeps its bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.edit import Edit
from everedit.errors import EditError, NotApplicable, NumericalError
from everedit.methods.ke import KeLearner
from everedit.models import LanguageModel
from tests.support import facts
from tests.support.editing import home_town, losses, probes
from tests.support.gradients import weight_gradients
from tests.support.loading import bits, edit_of, fresh, hooks_left, probe_of, same_bits, shared
from tests.support.transforms import dense, editor_with, outer_loss, same, untrained

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "llama", "gemma3_text", "t5"]
TABLE = facts.facts()
EDITS = [home_town(7, "Lisbon"), edit_of(TABLE[4], "New Delhi"), edit_of(TABLE[53], "Buenos Aires piano")]
EXAMPLES = [
    home_town(7, "Oslo", locality=probes()),
    home_town(3, "Oslo", locality=(probe_of(TABLE[40]),)),
    edit_of(TABLE[0], "New Delhi", locality=(probe_of(TABLE[70]),)),
]
Vectors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def learner_of(lm: LanguageModel, **settings: Any) -> KeLearner:
    learner = untrained(lm, "ke", **settings)
    assert isinstance(learner, KeLearner)
    return learner


def greedy_answer(lm: LanguageModel, edit: Edit) -> str:
    """What the model says where the new answer's tokens stand."""
    text = lm.encode(edit.prompt, edit.target_new)
    if lm.layout.is_decoder_only:
        logits = lm.model(torch.tensor([text.ids]), use_cache=False).logits[0, text.prompt_end - 1 : -1]
    else:
        source = torch.tensor([lm.tokenizer(edit.prompt).input_ids])
        logits = lm.model(input_ids=source, labels=torch.tensor([text.target_ids])).logits[0]
    return str(lm.tokenizer.decode(logits.argmax(-1), skip_special_tokens=True)).strip()


def condition_by_hand(learner: KeLearner, edit: Edit) -> Tensor:
    """The last state of both directions over "old >> new || prompt", through a linear layer and tanh."""
    lm = learner.lm
    text = f"{greedy_answer(lm, edit)} >> {edit.target_new} || {edit.prompt}"
    words = lm.model.get_input_embeddings()(torch.tensor(lm.tokenizer(text).input_ids)).detach()
    states, _ = learner.encoder(words)
    width = states.shape[1] // 2
    ends = torch.cat([states[-1, :width], states[0, width:]])
    return torch.tanh(learner.condition.weight @ ends + learner.condition.bias)


def vectors_by_hand(learner: KeLearner, number: int, condition: Tensor) -> Vectors:
    """col_a, row_a, col_b, row_b and eta of a weight of m x n, from weight-normalised layers."""
    first, _, last = learner.heads[number]  # type: ignore[misc]
    for layer, act in ((first, torch.tanh), (last, lambda values: values)):
        size, way = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        condition = act((size * way / way.norm(dim=1, keepdim=True)) @ condition + layer.bias)
    m, n = learner.shapes[learner.names[number]]
    assert len(condition) == 2 * (m + n) + 1
    return condition[:n], condition[n : n + m], condition[n + m : 2 * n + m], condition[2 * n + m : -1], condition[-1]


def gates_by_hand(learner: KeLearner, edit: Edit) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A and B (m, n), and sigmoid(eta), of each weight."""
    condition, found = condition_by_hand(learner, edit), {}
    for number, name in enumerate(learner.names):
        col_a, row_a, col_b, row_b, eta = vectors_by_hand(learner, number, condition)
        soft = [values.exp() / values.exp().sum() for values in (row_a, row_b)]
        found[name] = torch.outer(soft[0], col_a), torch.outer(soft[1], col_b), eta.sigmoid()
    return found


def changes_by_hand(learner: KeLearner, edit: Edit) -> dict[str, Tensor]:
    """max_scale sigmoid(eta) (grad * A + B), with the gradient of whole weights."""
    gradients, scale = weight_gradients(learner.lm, [edit], learner.names), learner.config.max_scale
    gates = gates_by_hand(learner, edit)
    return {name: scale * gate * (gradients[name] * a + b) for name, (a, b, gate) in gates.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_gates_and_shifts_the_whole_gradient(family: str, corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh(family)
    # The shift is small beside the gate only where the gate is large.
    learner = learner_of(lm, max_scale=2.5)
    for head in learner.heads:
        head[2].parametrizations.weight.original0.data *= 20  # type: ignore[index,union-attr]
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    assert learner.names == editor.method.weights(lm.layout)
    gradients = weight_gradients(lm, EDITS[:1], learner.names)
    for edit in EDITS:
        same(dense(editor, [edit]), {name: change.detach() for name, change in changes_by_hand(learner, edit).items()})
    for name, change in dense(editor, EDITS[:1]).items():
        a, b, gate = gates_by_hand(learner, EDITS[0])[name]
        assert [int(torch.linalg.matrix_rank(part, rtol=1e-4)) for part in (a, b)] == [1, 1]
        assert a.sum(0).tolist() == pytest.approx((a[0] / a[0] * a.sum(0)).tolist())
        bound = 2.5 * (gradients[name] * a + b).abs()
        assert bool((change.abs() <= bound * 1.001 + 1e-7).all())
        assert 0 < gate < 1
        # The gradient is a part of it that is seen.
        assert (gradients[name] * a).norm() > 0.01 * b.norm()
    # The next edit's gradient, and what was said before, are those of the edited model.
    editor.edit(EDITS[0], score=False)
    same(dense(editor, EDITS[1:2]), {name: c.detach() for name, c in changes_by_hand(learner, EDITS[1]).items()})


def test_rows_are_shares_and_the_condition_tells_edits_apart() -> None:
    learner = learner_of(shared("llama"))
    seen = []
    for edit in EDITS:
        condition = condition_by_hand(learner, edit)
        for number in range(len(learner.names)):
            m, n = learner.shapes[learner.names[number]]
            col_a, row_a, col_b, row_b, gate = learner.vectors(number, condition)
            assert [tuple(part.shape) for part in (col_a, row_a, col_b, row_b, gate)] == [(n,), (m,), (n,), (m,), (1,)]
            for row in (row_a, row_b):
                assert row.min() > 0
                assert row.sum().item() == pytest.approx(1, abs=1e-5)
        seen.append(condition)
    assert min((one - other).norm().item() for one in seen for other in seen if one is not other) > 1e-3
    same_seed, other_seed = (learner_of(shared("llama")).state_dict() for _ in range(2))
    assert all(torch.equal(same_seed[name], part) for name, part in other_seed.items())


def test_a_closed_gate_leaves_every_bit_and_no_divergence(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("llama")
    learner, before = learner_of(lm, objective="lagrangian"), bits(lm)
    for head in learner.heads:
        head[2].bias.data[-1] = -torch.inf  # type: ignore[index,union-attr]
    with torch.no_grad():
        figures = learner(EXAMPLES)[1]
    assert abs(figures["kl"]) < 1e-6
    assert figures["locality"] == 1.0
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    unedited = losses(lm, EDITS)
    editor.edit(EDITS, score=False)
    assert same_bits(lm, before)
    assert losses(lm, EDITS) == unedited


def test_with_an_open_gate_that_keeps_all_the_change_is_plus_the_gradient(
    corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(self: KeLearner, number: int, condition: Tensor) -> Vectors:
        m, n = self.shapes[self.names[number]]
        return torch.ones(n), torch.ones(m), torch.zeros(n), torch.zeros(m), torch.ones(1)

    monkeypatch.setattr(KeLearner, "vectors", open_)
    lm = fresh("gpt2")
    editor = editor_with(learner_of(lm, max_scale=0.7), corpus_path, tmp_path / "net")
    gradients = weight_gradients(lm, EDITS[2:], editor.method.weights(lm.layout))
    same(dense(editor, EDITS[2:]), {name: 0.7 * gradient for name, gradient in gradients.items()})


# --------------------------------------------------------------------------- training


def loss_by_hand(learner: KeLearner, examples: Sequence[Edit]) -> tuple[Tensor, Tensor, Tensor]:
    """The last example's loss by its prompt and in other words, plain and smoothed, and the divergence on probes."""
    lm, edit = learner.lm, examples[-1]
    changes = changes_by_hand(learner, edit)
    own = edit.model_copy(update={"rephrase": ()})
    parts = [outer_loss(lm, [one], changes)[0] for one in (own, edit)]
    apart, places = [], []
    for example in examples:
        apart.append(outer_loss(lm, [example.model_copy(update={"rephrase": ()})], changes)[1])
        probe = example.locality[0]
        ids = lm.encode(probe.prompt, probe.answer)
        places.append(len(ids.ids) - 1 if lm.layout.is_decoder_only else len(ids.target_ids))
    moved = sum(n * part for n, part in zip(places, apart, strict=True)) / sum(places)
    uniform = [outer_loss_uniform(learner, one, changes) for one in (own, edit)]
    smooth = learner.config.smoothing
    likely = sum(parts) / 2
    return likely, (1 - smooth) * likely + smooth * sum(uniform) / 2, moved


def outer_loss_uniform(learner: KeLearner, edit: Edit, changes: Mapping[str, Tensor]) -> Tensor:
    """The mean over tokens and vocabulary of -log p."""
    from everedit.models.layout import oriented
    from tests.support.gradients import as_stored, whole_logits

    lm = learner.lm
    weights = {name: as_stored(lm, name, oriented(lm.layout.module_of(name)) + c) for name, c in changes.items()}
    prompt = edit.rephrase[0] if edit.rephrase else edit.prompt
    return -F.log_softmax(whole_logits(lm, prompt, edit.target_new, weights), -1).mean()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {"objective": "lagrangian", "margin": 0.02}),
        ("llama", {"objective": "weighted", "c_edit": 0.3, "c_loc": 2.0}),
        ("t5", {"objective": "lagrangian", "margin": 5.0, "smoothing": 0.3}),
    ],
)
def test_the_loss_and_its_gradients_are_those_of_whole_edited_weights(family: str, settings: dict[str, Any]) -> None:
    lm = fresh(family)
    before = bits(lm)
    learner = learner_of(lm, layers=(1, 2), max_scale=300.0, **settings).train()
    learner.multiplier.data.fill_(1.7)
    loss, figures = learner(EXAMPLES)
    loss.backward()
    likely, smoothed, moved = loss_by_hand(learner, EXAMPLES)
    if learner.config.objective == "lagrangian":
        expected = smoothed + learner.multiplier * (moved - settings["margin"])
    else:
        expected = 0.3 * likely + 2.0 * moved
    assert (loss.item(), figures["nll"], figures["kl"]) == pytest.approx(
        (expected.item(), likely.item(), moved.item()), rel=1e-3
    )
    assert moved.item() > 0.01
    trained = {name: weight for name, weight in learner.named_parameters() if weight.grad is not None}
    assert ("multiplier" in trained) == (learner.config.objective == "lagrangian")
    assert len(trained) >= len(list(learner.parameters())) - 1
    wanted = torch.autograd.grad(expected, list(trained.values()))
    for (name, weight), other in zip(trained.items(), wanted, strict=True):
        assert weight.grad is not None
        assert (weight.grad - other).norm() < 1e-2 * other.norm() + 1e-6, name
    assert same_bits(lm, before)
    assert all(weight.grad is None and not weight.requires_grad for weight in lm.model.parameters())
    assert hooks_left(lm) == []


@pytest.mark.parametrize(("margin", "rises"), [(1e-6, True), (1e6, False)])
def test_the_multiplier_rises_above_the_margin_falls_below_it_and_is_never_negative(margin: float, rises: bool) -> None:
    learner = learner_of(shared("llama"), objective="lagrangian", margin=margin, max_scale=30.0, multiplier_lr=0.3)
    learner.multiplier.data.fill_(1.0)
    optimiser, seen = learner.optimiser(), [1.0]
    assert isinstance(optimiser, torch.optim.RMSprop)
    assert [group["centered"] for group in optimiser.param_groups] == [True, True]
    assert [group["lr"] for group in optimiser.param_groups] == [learner.config.lr, 0.3]
    optimiser.param_groups[0]["lr"] = 0.0
    for _ in range(5):
        optimiser.zero_grad()
        loss, figures = learner(EXAMPLES[:1])
        assert (figures["kl"] > margin) == rises
        loss.backward()
        optimiser.step()
        learner.after_step()
        seen.append(learner.multiplier.item())
    assert min(seen) >= 0
    assert seen == sorted(seen, reverse=not rises)
    assert seen[-1] > 2 if rises else seen[-1] == 0


def test_the_margin_tightens_once_edits_succeed_and_not_beyond_its_end() -> None:
    learner = learner_of(shared("llama"), objective="lagrangian", margin=1e-3, least_margin=4e-4)
    seen = []
    for reliability in (0.5, 0.9, 0.91, 0.3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        learner.after_validation({"reliability": reliability})
        seen.append(learner.margin.item())
    assert seen[:5] == pytest.approx([1e-3, 1e-3, 8e-4, 8e-4, 6.4e-4])
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] == pytest.approx(4e-4)
    # It is part of what is saved and gone on from.
    other = learner_of(shared("llama"), objective="lagrangian")
    other.load_state_dict(learner.state_dict())
    assert other.margin.item() == pytest.approx(4e-4)


def test_the_learning_rate_climbs_and_falls_and_the_ports_does_not() -> None:
    learner = learner_of(shared("llama"), objective="lagrangian", warm_up=100, falls_over=1000)
    rates = [learner.rate(step) for step in (1, 50, 100, 550, 1000, 2000)]
    assert rates == pytest.approx([0.01 * 0.999, 0.5 * 0.95, 0.9, 0.45, 0.0, 0.0])
    port = learner_of(shared("llama"), objective="weighted")
    assert {port.rate(step) for step in (1, 50, 10**6)} == {1.0}
    assert isinstance(port.optimiser(), torch.optim.Adam)
    assert len(port.optimiser().param_groups) == 1


def test_the_constrained_training_makes_its_edits_and_keeps_other_answers() -> None:
    lm = shared("llama")
    edits = [home_town(person, locality=probes()) for person in (0, 10, 20)]
    settings = {"objective": "lagrangian", "margin": 0.05, "least_margin": 0.01, "warm_up": 10, "lr": 3e-3}
    learner = learner_of(lm, **settings)
    optimiser, figures = learner.optimiser(), [{"reliability": 0.0, "kl": 1.0}]
    rates, multipliers = [group["lr"] for group in optimiser.param_groups], []
    for step in range(1, 241):
        optimiser.zero_grad()
        loss, _ = learner.train()([edits[step % 3]])
        loss.backward()
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * learner.rate(step)
        optimiser.step()
        learner.after_step()
        multipliers.append(learner.multiplier.item())
        if step % 20 == 0:
            with torch.no_grad():
                figures = [learner.eval()([edit])[1] for edit in edits]
            learner.after_validation({"reliability": sum(each["reliability"] for each in figures) / 3})
            if all(each["reliability"] == 1 and each["kl"] < 0.2 for each in figures):
                break
    print(step, figures, multipliers[::20])
    assert min(each["reliability"] for each in figures) == 1
    assert learner.margin < 0.05


# --------------------------------------------------------------------------- what it is given


def test_it_makes_one_edit_at_a_time_each_on_the_model_as_it_is(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("llama")
    learner = learner_of(lm, max_scale=30.0)
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    with pytest.raises(NotApplicable, match="ke makes one edit at a time"):
        next(editor.stream(EDITS, 2))
    commits = editor.edit(EDITS, score=False).commits
    assert [len(commit.edits) for commit in commits] == [1, 1, 1]
    editor.reset()
    editor.edit(EDITS[0], score=False)
    editor.edit(EDITS[1], score=False)
    same(dense(editor, EDITS[2:]), {name: delta.dense() for name, delta in commits[2].patch.deltas.items()})


def test_what_is_broken_or_lacks_a_probe_is_refused_and_nothing_is_lost(corpus_path: Path, tmp_path: Path) -> None:
    lm = fresh("llama")
    learner, before, state = learner_of(lm), bits(lm), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state)
    editor = editor_with(learner, corpus_path, tmp_path / "net")
    bare = EXAMPLES[0].model_copy(update={"locality": ()})
    with pytest.raises(EditError, match="no locality probe, and training needs one"):
        editor.method.check_example(editor.bench, bare)  # type: ignore[attr-defined]
    learner.condition.bias.data.fill_(float("nan"))
    broken = editor_with(learner, corpus_path, tmp_path / "broken")
    with pytest.raises(NumericalError, match="not finite; nothing was written"):
        broken.edit(EDITS, score=False)
    assert same_bits(lm, before)
