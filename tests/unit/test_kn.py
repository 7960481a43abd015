"""KN against its definitions: attributions by whole forwards with hooks, and the columns worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.attribution import attributions
from everedit.engine.state import State
from everedit.errors import EditError
from everedit.methods import kn
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.patch import Patch
from tests.support import facts
from tests.support.editing import make_editor
from tests.support.loading import bits, edit_of, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "llama", "gptj", "gemma2", "opt"]
FACT = facts.facts()[40]
EDIT = edit_of(FACT)
Neuron = tuple[int, int]


def ids_and_answer(lm: LanguageModel, fact: facts.Fact = FACT) -> tuple[list[int], int]:
    prompt, whole = (lm.tokenizer(text)["input_ids"] for text in (fact.prompt, f"{fact.prompt} {fact.answer}"))
    assert whole[: len(prompt)] == prompt
    return prompt, whole[len(prompt)]


def chance(lm: LanguageModel, ids: Sequence[int], answer: int, layer: int, neurons: Tensor) -> Tensor:
    """P(answer) by one forward of the whole model, with ``neurons`` in a layer at the last token."""

    def put(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole = args[0].reshape(len(ids), -1)
        return (torch.cat([whole[:-1], neurons.to(whole.dtype)[None]]).view_as(args[0]),)

    handle = lm.layout.mlp_out(layer).register_forward_pre_hook(put)
    try:
        return lm.model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1].softmax(-1)[answer]
    finally:
        handle.remove()


def activations(lm: LanguageModel, ids: Sequence[int], layer: int) -> Tensor:
    seen: list[Tensor] = []
    handle = lm.layout.mlp_out(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    lm.model(torch.tensor([list(ids)]), use_cache=False)
    handle.remove()
    return seen[0].reshape(len(ids), -1)[-1].clone()


def plain(lm: LanguageModel, ids: Sequence[int], answer: int, layer: int, steps: int) -> Tensor:
    """(w / m) sum of dP(k w / m)/dw over k = 1..m, one whole forward and backward after the other."""
    neurons = activations(lm, ids, layer)
    total = torch.zeros_like(neurons)
    for k in range(1, steps + 1):
        at = (neurons * k / steps).requires_grad_()
        with torch.enable_grad():
            total += torch.autograd.grad(chance(lm, ids, answer, layer, at), at)[0]
    return neurons * total / steps


def double(family: str) -> LanguageModel:
    lm = fresh(family)
    lm.model.double()
    return lm


# --------------------------------------------------------------------------- attributions


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_of_one_token_behind_a_cache_equal_whole_forwards_with_hooks(family: str) -> None:
    lm = shared(family)
    before, generator = bits(lm), torch.get_rng_state()
    ids, answer = ids_and_answer(lm)
    found, neurons = attributions(lm, ids, answer, 3)
    assert found.shape == neurons.shape == (4, 256)
    for layer in range(4):
        torch.testing.assert_close(neurons[layer], activations(lm, ids, layer), rtol=1e-4, atol=1e-5)
        expected = plain(lm, ids, answer, layer, 3)
        assert float(expected.norm()) > 1e-4
        assert float((found[layer] - expected).norm()) < 2e-3 * float(expected.norm())
    assert same_bits(lm, before)
    assert hooks_left(lm) == []
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_of_one_token_needs_no_cache(family: str) -> None:
    lm = shared(family)
    ids, answer = ids_and_answer(lm)
    found, _ = attributions(lm, ids[:1], answer, 2)
    for layer in (0, 3):
        expected = plain(lm, ids[:1], answer, layer, 2)
        assert float((found[layer] - expected).norm()) < 2e-3 * float(expected.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_one_step_the_attribution_is_the_slope_by_finite_differences(family: str) -> None:
    lm, wide = shared(family), double(family)
    ids, answer = ids_and_answer(lm)
    found, _ = attributions(lm, ids, answer, 1)
    for layer in (1, 3):
        neurons = activations(wide, ids, layer)
        largest = [int(i) for i in found[layer].abs().topk(4).indices]
        for index in [*largest, 0, 100]:
            nudge = torch.zeros_like(neurons)
            nudge[index] = 2e-3  # large enough for the norms that llama takes in float32 even here
            rise = chance(wide, ids, answer, layer, neurons + nudge) - chance(wide, ids, answer, layer, neurons - nudge)
            slope = float(neurons[index] * rise / 4e-3)
            assert float(found[layer, index]) == pytest.approx(slope, rel=2e-2, abs=1e-5)


# Not Gemma 2: behind the norm that follows its MLP a smaller w is as good as w, down to almost nothing, and all that
# P(w) - P(0) is made of lies below the first step of any affordable grid.
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "opt"])
def test_a_layers_attributions_add_up_to_what_its_neurons_do_together(family: str) -> None:
    """sum Attr -> P(w) - P(0), with an error that falls as 1/m."""
    lm, wide = shared(family), double(family)
    ids, answer = ids_and_answer(lm)
    gaps = {}
    for steps in (20, 200):
        sums = attributions(lm, ids, answer, steps)[0].double().sum(1)
        gaps[steps] = []
        for layer in range(4):
            neurons = activations(wide, ids, layer)
            whole = chance(wide, ids, answer, layer, neurons) - chance(wide, ids, answer, layer, 0 * neurons)
            gaps[steps].append(abs(float(sums[layer] - whole)))
    assert max(gaps[20]) > 1e-3
    assert max(gaps[200]) < 0.02
    for coarse, fine in zip(gaps[20], gaps[200], strict=True):
        assert fine < coarse / 5 + 2e-5


def test_a_neuron_that_writes_nothing_gets_nothing() -> None:
    lm = fresh("gpt2")
    ids, answer = ids_and_answer(lm)
    top = int(attributions(lm, ids, answer, 5)[0][2].abs().argmax())
    oriented(lm.layout.mlp_out(2))[:, top] = 0.0
    found, neurons = attributions(lm, ids, answer, 5)
    assert float(neurons[2, top].abs()) > 0
    assert float(found[2, top]) == 0.0
    assert int((found[2] == 0).sum()) == 1


def as_linear(lm: LanguageModel) -> LanguageModel:
    """The same model with its down projections stored the other way round."""
    for layer in range(lm.layout.n_layers):
        old, block = lm.layout.mlp_out(layer), lm.layout.block(layer)
        new = nn.Linear(old.weight.shape[0], old.weight.shape[1])
        new.weight.data, new.bias.data = old.weight.data.T.contiguous(), old.bias.data
        block.mlp.c_proj = new.requires_grad_(False)
    return lm


# --------------------------------------------------------------------------- from scores to neurons


def editor_of(model: LanguageModel | str, corpus: Path, **settings: Any) -> Editor:
    lm = shared(model) if isinstance(model, str) else model
    return make_editor(lm, corpus, "kn", method_settings=settings)


def chosen(monkeypatch: pytest.MonkeyPatch, corpus: Path, scores: Sequence[Sequence[float]], **settings: Any) -> Any:
    """The neurons that are kept, given each wording's scores: all in layer 0, as indices."""
    left = [torch.tensor([list(row), [0.0] * len(row)]) for row in scores]
    monkeypatch.setattr(kn, "attributions", lambda *_: (left.pop(0), torch.zeros(2, len(scores[0]))))
    editor = editor_of("gpt2", corpus, **settings)
    found, _ = editor.method.neurons(editor.lm, ["x"] * len(scores), 0)
    assert all(layer == 0 for layer, _ in found)
    return [index for _, index in found]


# Above a fifth of its largest, wording by wording: {0, 1, 4}, {0, 1, 2}, {0, 2, 5}.
SCORES = [[10, 3, 1, 0, 5, -9], [5, 2, 4, 0, 0.9, 0], [8, 1, 2, 0, 0, 3]]


@pytest.mark.parametrize(
    ("settings", "neurons"),
    [
        ({"share": 0.0}, [0, 1, 2, 4, 5]),  # the union
        ({"share": 1.0}, [0]),  # the intersection
        ({"share": 0.6}, [0, 1, 2]),  # in two wordings of three
        ({"share": 0.7}, [0]),
        ({"share": 0.0, "threshold": 1.0}, [0]),  # each wording's largest alone
        ({"share": 0.0, "threshold": 0.5}, [0, 2, 4]),
        ({"share": 0.0, "most": 3}, [0, 1, 2]),  # summed over the wordings that found it: 23, 5, 6, then 5 and 3
        ({"share": 0.0, "wordings": 4}, [0]),  # too few wordings for a share: in all of them
    ],
)
def test_neurons_are_those_above_a_share_of_the_largest_in_a_share_of_the_wordings(
    settings: dict[str, Any], neurons: list[int], corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [[*row] for row in SCORES]
    if "most" in settings:
        scores[0][4] = 2.5  # a tie would be decided by nothing that is documented
    assert chosen(monkeypatch, corpus_path, scores, **settings) == neurons


def test_a_wordings_largest_score_stands_over_all_layers(corpus_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch.tensor([[4.0, 0.0, 1.0], [20.0, 3.0, 5.0]])
    monkeypatch.setattr(kn, "attributions", lambda *_: (found, found))
    editor = editor_of("gpt2", corpus_path, threshold=0.2)
    assert editor.method.neurons(editor.lm, ["x"], 0)[0] == [(0, 0), (1, 0), (1, 2)]


def test_where_no_neuron_serves_the_wordings_those_of_the_edits_own_prompt_are_taken(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = [[9.0, 8.0, 0, 0, 0], [0, 0, 9.0, 0, 0], [0, 0, 0, 9.0, 8.0]]
    assert chosen(monkeypatch, corpus_path, apart, share=1.0) == [0, 1]


def test_nothing_is_chosen_where_no_neuron_bears_on_the_answer(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A probability that underflows has no slope at all; the threshold lets only positive scores pass.
    with pytest.raises(EditError, match="no neuron bears on the present answer"):
        chosen(monkeypatch, corpus_path, [[0.0, 0.0, 0.0]])


# --------------------------------------------------------------------------- the change


def fit(editor: Editor, edit: Edit) -> tuple[Patch, list[Neuron], dict[str, Tensor]]:
    before = bits(editor.lm)
    patch, state = editor.method.fit(editor.bench, [edit], State())
    assert state == State()
    assert same_bits(editor.lm, before)
    return patch, [(layer, at) for layer, at in patch.info["neurons"]], {n: d.dense() for n, d in patch.deltas.items()}


@pytest.mark.parametrize("embedding", ["input", "output"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gemma2"])
def test_only_the_listed_columns_change_and_each_from_the_old_answer_to_the_new(
    family: str, embedding: str, corpus_path: Path
) -> None:
    editor = editor_of(family, corpus_path, steps=4, most=6, remove=0.5, add=3.0, embedding=embedding)
    lm = editor.lm
    ids, old = ids_and_answer(lm)
    new = lm.tokenizer(f"{EDIT.prompt} {EDIT.target_new}")["input_ids"][len(ids)]
    patch, neurons, changes = fit(editor, EDIT.model_copy(update={"ground_truth": FACT.answer}))
    assert (len(neurons), patch.info["answer"]) == (6, old)
    part = lm.model.get_input_embeddings() if embedding == "input" else lm.model.get_output_embeddings()
    e_old, e_new = part.weight[old].double(), part.weight[new].double()
    assert sorted(changes) == sorted({lm.layout.mlp_out_weight(layer) for layer, _ in neurons})
    gated = family in ("llama", "gemma2")
    signs = set()
    for layer in {layer for layer, _ in neurons}:
        weight, change = oriented(lm.layout.mlp_out(layer)).double(), changes[lm.layout.mlp_out_weight(layer)].double()
        listed = [index for at, index in neurons if at == layer]
        assert sorted(change.norm(dim=0).nonzero()[:, 0].tolist()) == sorted(listed)
        for index in listed:
            size, sign = weight[:, index].norm(), activations(lm, ids, layer)[index].sign() if gated else 1.0
            expected = sign * (3.0 * size / e_new.norm() * e_new - 0.5 * size / e_old.norm() * e_old)
            torch.testing.assert_close(change[:, index], expected, rtol=1e-4, atol=1e-5)
            signs.add(float(sign))
    # Otherwise the rule for gated MLPs would not have been tried.
    assert signs == ({-1.0, 1.0} if gated else {1.0})


@pytest.mark.parametrize(("family", "gated"), [("gpt2", False), ("opt", False), ("llama", True), ("phi3", True)])
def test_the_sign_of_an_activation_counts_in_gated_mlps_unless_told_otherwise(
    family: str, gated: bool, corpus_path: Path
) -> None:
    assert editor_of(family, corpus_path).method.config.signed is gated
    assert editor_of(family, corpus_path, signed=not gated).method.config.signed is not gated


def test_without_the_sign_a_negative_neuron_moves_the_other_way(corpus_path: Path) -> None:
    (_, neurons, with_sign), (_, same, without) = (
        fit(editor_of("llama", corpus_path, steps=4, signed=signed), EDIT) for signed in (True, False)
    )
    assert neurons == same
    turned = 0
    for name, change in with_sign.items():
        # Column by column the two are equal or opposite.
        for one, other in zip(change.T, without[name].T, strict=True):
            assert torch.equal(one, other) or torch.equal(one, -other)
            turned += bool((one != other).any())
    assert 0 < turned < len(neurons)


def test_without_a_true_answer_the_models_own_is_taken_out(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, steps=2)
    ids, true = ids_and_answer(editor.lm)
    wrong = editor.lm.tokenizer(f"{FACT.prompt} {facts.counterfactual(FACT)}")["input_ids"][len(ids)]
    said = int(editor.lm.model(torch.tensor([ids])).logits[0, -1].argmax())
    assert fit(editor, EDIT)[0].info["answer"] == said == true
    other = EDIT.model_copy(update={"ground_truth": facts.counterfactual(FACT)})
    assert fit(editor, other)[0].info["answer"] == wrong != true


def test_weights_stored_either_way_round_give_the_same_change(corpus_path: Path) -> None:
    one, other = (fit(editor_of(lm, corpus_path, steps=3), EDIT) for lm in (shared("gpt2"), as_linear(fresh("gpt2"))))
    assert one[1] == other[1]
    for name, change in one[2].items():
        torch.testing.assert_close(other[2][name], change, rtol=1e-4, atol=1e-6)


def test_kn_makes_one_edit_at_a_time(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path)
    with pytest.raises(EditError, match="one edit at a time"):
        editor.method.fit(editor.bench, [EDIT, EDIT], State())
