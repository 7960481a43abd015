"""MEMOIR: masks are the sets of the paper, training is plain gradient descent inside them, and overlap decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from everedit.data import load_edits
from everedit.editor import Editor
from everedit.engine.state import State
from everedit.methods.memoir import ResidualMemory, TopHash
from everedit.models import LanguageModel
from everedit.models.calls import decisions_of
from everedit.models.hooks import changed_output
from everedit.models.prefill import Prefill
from everedit.models.tokens import Encoded
from tests.support import facts
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, edit_of, fresh, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["llama", "gpt2", "opt", "gemma3_text"]
LAYER, WIDTH, K = 2, 256, 60
# Prompts of three lengths and targets of one, two and three tokens.
EDITS = [home_town(7, "Lisbon"), home_town(24, "New Delhi"), home_town(4, "Buenos Aires piano")]
UNSEEN = [home_town(person).prompt for person in (1, 2, 3)]


def editor_of(model: LanguageModel | str, corpus: Path, **settings: Any) -> Editor:
    usual = {"layer": LAYER, "k": K, "steps": 3, "contexts": (), "background": 8}
    return make_editor(model, corpus, "memoir", method_settings={**usual, **settings})


def states(lm: LanguageModel, texts: Sequence[str]) -> Tensor:
    return lm.states(**lm.pad([lm.encode(text).ids for text in texts]).inputs())


def keys_of(lm: LanguageModel, text: str) -> Tensor:
    """What enters the layer's down projection, (tokens, width)."""
    return lm.inputs_of({"key": lm.layout.mlp_out(LAYER)}, lm.pad([lm.encode(text).ids]))["key"].view(-1, WIDTH)


def mask_by_hand(keys: Tensor, state: State, k: int = K, feature: str = "mean_decentered") -> set[int]:
    """The mask as a set, of the features of all tokens of a prompt one after another."""
    background, places = (state.tensors[name].tolist() for name in ("background", "places"))
    rows = keys.tolist()
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    values = {"last": rows[-1], "mean": mean, "mean_decentered": [x - b for x, b in zip(mean, background, strict=True)]}
    ranked = sorted(range(len(mean)), key=lambda index: -abs(values[feature][index]))
    return {places[index] for index in ranked[:k]}


def masks(state: State) -> list[set[int]]:
    return [set(row) for row in state.tensors["columns"].tolist()]


def load(editor: Editor, **tensors: Tensor) -> None:
    editor.load_state(replace(editor.state(), method=State({**editor.state().method.tensors, **tensors})))


@pytest.mark.parametrize("feature", ["mean_decentered", "mean", "last"])
def test_a_mask_is_the_set_of_the_largest_features_moved_to_their_places(feature: str, corpus_path: Path) -> None:
    editor = editor_of(shared("llama"), corpus_path, feature=feature, steps=1)
    _, state = editor.method.fit(editor.bench, EDITS, State())
    assert sorted(state.tensors["places"].tolist()) == list(range(WIDTH)) != state.tensors["places"].tolist()
    by_hand = [mask_by_hand(keys_of(editor.lm, edit.prompt), state, feature=feature) for edit in EDITS]
    assert masks(state) == by_hand
    assert by_hand[0] != by_hand[1]


def test_the_background_is_the_mean_over_prompts_that_no_edit_is_about(corpus_path: Path) -> None:
    editor = editor_of(shared("gpt2"), corpus_path, steps=1)
    _, state = editor.method.fit(editor.bench, EDITS[:1], State())
    pool = load_edits("worldfacts").edits[:8]
    texts = [edit.locality[0].prompt if edit.locality else edit.prompt for edit in pool]
    expected = torch.stack([keys_of(editor.lm, text).mean(0) for text in texts]).mean(0)
    assert expected.norm() > 0.1
    torch.testing.assert_close(state.tensors["background"], expected, rtol=1e-4, atol=1e-5)


def test_overlap_does_not_depend_on_the_permutation_and_is_hypergeometric_for_random_features() -> None:
    random = torch.Generator().manual_seed(1)
    keys, real = torch.randn(400, 3, WIDTH, generator=random), torch.ones(400, 3, dtype=torch.bool)
    background, shares, places = torch.zeros(WIDTH), [], torch.arange(WIDTH)
    for moved in (places, torch.randperm(WIDTH, generator=random)):
        hasher = TopHash(background, moved, K, "mean_decentered")
        columns = hasher.columns(keys, real)
        memory = ResidualMemory(LAYER, hasher, torch.zeros(4, WIDTH), columns[:200], 0.4)
        shares.append(memory.overlaps(columns[200:]))
        assert torch.equal(columns, columns.sort(1).values)
    assert torch.equal(shares[0], shares[1])
    chance = K / WIDTH
    variance = chance * (1 - chance) * (WIDTH - K) / (WIDTH - 1) / K
    pairs = shares[0].double()
    assert float(pairs.mean()) == pytest.approx(chance, abs=3 * (variance / 200) ** 0.5)
    assert float(pairs.var()) == pytest.approx(variance, rel=0.1)
    sets = [set(row) for row in columns.tolist()]
    assert float(pairs[5, 7]) == pytest.approx(len(sets[205] & sets[7]) / K)


def test_text_behind_the_prompt_does_not_change_the_mask(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, steps=1)
    lm, prompt, targets = editor.lm, EDITS[0].prompt, ["Oslo", "Buenos Aires", "New Delhi and the clock maker"]
    found = [editor.method.fit(editor.bench, [home_town(7, target)], State())[1] for target in targets]
    assert masks(found[0]) == masks(found[1]) == masks(found[2])
    # A hash of the whole text would have been seen.
    assert [mask_by_hand(keys_of(lm, f"{prompt} {targets[2]}"), found[0])] != masks(found[0])
    editor.edit(home_town(7), score=False)
    prefill = Prefill.of(lm, [lm.encode(prompt).ids])
    assert prefill.decisions["memoir"].tolist() == [0]
    behind = prefill.states_behind(torch.tensor([0]), [lm.encode(prompt, targets[2]).target_ids])
    expected = by_hand_through_memory(editor, f"{prompt} {targets[2]}", 0)[None, -behind.shape[1] :]
    torch.testing.assert_close(behind, expected, rtol=1e-3, atol=1e-4)


def trained_by_hand(
    lm: LanguageModel, texts: Sequence[Encoded], mask: set[int], weight: Tensor, decay: float
) -> tuple[list[Tensor], list[float]]:
    """W_m before and after each of four steps of descent on the whole matrix, and the losses, by whole forwards."""
    weight = weight.clone().requires_grad_()
    kept = torch.tensor([float(index in mask) for index in range(WIDTH)])
    optimiser, found, seen = torch.optim.SGD([weight], lr=1.0, weight_decay=decay), [weight.detach().clone()], []
    for _ in range(4):
        loss = torch.zeros(())
        for text in texts:
            with changed_output(lm.layout.mlp_out(LAYER), lambda key, out: out + F.linear(key * kept, weight)):
                logits = lm.model(torch.tensor([text.ids]), use_cache=False).logits[0, text.prompt_end - 1 : -1]
            loss = loss + F.cross_entropy(logits, torch.tensor(text.target_ids)) / len(texts)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimiser.step()
        found.append(weight.detach().clone())
        seen.append(loss.item())
    return found, seen


@pytest.mark.parametrize(
    ("family", "k", "contexts", "decay"),
    [("gpt2", K, ((6, 2),), 0.0), ("opt", K, (), 0.05), ("llama", WIDTH, (), 0.0), ("gpt2", WIDTH, (), 0.05)],
)
def test_w_m_is_what_gradient_descent_inside_the_mask_finds(
    family: str, k: int, contexts: Any, decay: float, corpus_path: Path
) -> None:
    """With a mask of all inputs this is plain fine-tuning of a matrix beside the weight."""
    lm, edit, settings = shared(family), EDITS[2], {"k": k, "contexts": contexts, "weight_decay": decay, "steps": 4}
    editor = editor_of(lm, corpus_path, **settings)
    start = editor.method.fit(editor.bench, EDITS[:1], State())[1]
    prefixes = editor.method.prefixes(editor.bench)
    assert len(prefixes) == (3 if contexts else 1)
    texts = [lm.encode(edit.prompt, edit.target_new, prefix=prefix) for prefix in prefixes]
    mask = mask_by_hand(keys_of(lm, edit.prompt), start, k)
    weights, seen = trained_by_hand(lm, texts, mask, start.tensors["weight"], decay)
    assert seen[-1] < seen[0] - 0.1
    # All steps, and two: no step is made where the loss stands still below stop_loss.
    for steps, stop in ((4, {}), (2, {"stop_loss": seen[2] + 1e-3, "stop_change": 9})):
        editor = editor_of(lm, corpus_path, **settings, **stop)
        state = editor.method.fit(editor.bench, [edit], start)[1]
        assert (state.tensors["weight"] - weights[steps]).norm() < 1e-2 * (weights[steps] - weights[0]).norm()


def test_only_columns_of_stored_masks_are_written_and_no_weight_of_the_model(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    before = bits(editor.lm)
    editor.edit([*EDITS, EDITS[0]], score=False)
    assert same_bits(editor.lm, before)
    state = editor.state().method
    assert len(masks(state)) == 3  # a mask that is there already is not stored again
    written = state.tensors["weight"].abs().amax(0).nonzero()[:, 0].tolist()
    assert K < len(written) < WIDTH
    assert written == sorted(set.union(*masks(state)))


def test_training_a_second_edit_of_a_disjoint_mask_leaves_the_first_ones_bits(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, k=8)
    first, second = home_town(0), edit_of(facts.facts()[25])
    editor.edit(first, score=False)
    alone = states(editor.lm, [first.prompt])
    assert not torch.equal(alone, states(shared("llama"), [first.prompt]))
    editor.edit(second, score=False)
    mine, other = masks(editor.state().method)
    assert mine.isdisjoint(other)
    assert torch.equal(states(editor.lm, [first.prompt]), alone)
    assert not torch.equal(states(editor.lm, [second.prompt]), states(shared("llama"), [second.prompt]))
    # An overlapping one does move it.
    editor.edit(home_town(1), score=False)
    assert masks(editor.state().method)[2] & mine
    assert not torch.equal(states(editor.lm, [first.prompt]), alone)


def by_hand_through_memory(editor: Editor, text: str, entry: int) -> Tensor:
    """The states (tokens, H) of one text with W_0 a + W_m (M a) at every token of the layer, M being a set."""
    tensors = editor.state().method.tensors
    mask = torch.tensor([float(index in masks(editor.state().method)[entry]) for index in range(WIDTH)])

    def change(key: Tensor, output: Tensor) -> Tensor:
        return output + torch.einsum("...d,hd->...h", key * mask, tensors["weight"])

    with editor.unedited() as lm, changed_output(lm.layout.mlp_out(LAYER), change):
        return states(lm, [text])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_edited_prompt_finds_its_own_mask_and_goes_through_it(family: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, steps=5)
    editor.edit(EDITS, score=False)
    memory, lm = editor.method.memory(editor.bench, editor.state().method), editor.lm
    assert isinstance(memory, ResidualMemory)
    for entry, edit in enumerate(EDITS):
        keys = keys_of(lm, edit.prompt)[None]
        columns = memory.hash.columns(keys, torch.ones(keys.shape[:2], dtype=torch.bool))
        shares = memory.overlaps(columns)[0]
        assert shares[entry] == 1 > shares.sort().values[-2]
        found = states(lm, [edit.prompt])[0]
        torch.testing.assert_close(found, by_hand_through_memory(editor, edit.prompt, entry), rtol=1e-3, atol=1e-4)
        assert (found - states(shared(family), [edit.prompt])[0]).norm() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_queries_is_answered_row_by_row(family: str, side: str, corpus_path: Path) -> None:
    editor = editor_of(family, corpus_path, threshold=0.9)
    editor.edit(EDITS, score=False)
    lm, texts = editor.lm, [EDITS[2].prompt, UNSEEN[0], EDITS[0].prompt, EDITS[1].prompt]
    batch, cache = lm.pad([lm.encode(text).ids for text in texts], side=side), DynamicCache()
    together = lm.states(**batch.inputs(), past_key_values=cache, use_cache=True)
    assert decisions_of(cache)["memoir"].tolist() == [2, -1, 0, 1]
    for row, text in enumerate(texts):
        alone, end = states(lm, [text])[0], int(batch.shift[row] + batch.mask[row].sum())
        torch.testing.assert_close(together[row, end - len(alone) : end], alone, rtol=1e-3, atol=1e-4)


def test_the_memory_answers_from_the_threshold_on() -> None:
    stored = torch.arange(K)[None]
    hasher = TopHash(torch.zeros(WIDTH), torch.arange(WIDTH), K, "mean")
    for shared_columns in range(K + 1):
        key = torch.zeros(1, 1, WIDTH)
        key[..., K - shared_columns : 2 * K - shared_columns] = 1.0
        for threshold, answer in ((shared_columns / K, 0), ((shared_columns + 0.5) / K, -1)):
            memory = ResidualMemory(LAYER, hasher, torch.zeros(4, WIDTH), stored, threshold)
            assert memory.chosen(key, torch.ones(1, 1, dtype=torch.bool)).tolist() == [answer]


def test_below_the_threshold_the_model_is_as_it_was_to_the_bit(corpus_path: Path) -> None:
    lm = fresh("gpt2")
    editor = editor_of(lm, corpus_path)
    base = [states(lm, [text]) for text in UNSEEN]
    own = [mask_by_hand(keys_of(lm, text), editor.method.fit(editor.bench, EDITS[:1], State())[1]) for text in UNSEEN]
    editor.edit(EDITS[0], score=False)
    held = editor.state()
    common = [len(mask & masks(held.method)[0]) for mask in own]
    assert all(0 < count < K for count in common)
    for text, plain, count in zip(UNSEEN, base, common, strict=True):
        for threshold, same in ((count / K, False), ((count + 0.5) / K, True), (1.001, True)):
            editor.reset()
            editor = editor_of(lm, corpus_path, threshold=threshold)
            editor.load_state(held)
            assert hooks_left(lm)
            assert torch.equal(states(lm, [text]), plain) == same
    # Above 1 not even an edited prompt is answered.
    assert losses(lm, EDITS[:1]) == losses(shared("gpt2"), EDITS[:1])


def test_a_mask_of_all_inputs_is_shared_by_every_prompt(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path, k=WIDTH, threshold=1.0)
    editor.edit(EDITS[0], score=False)
    for text in UNSEEN:
        found = states(editor.lm, [text])[0]
        torch.testing.assert_close(found, by_hand_through_memory(editor, text, 0), rtol=1e-3, atol=1e-4)
        assert not torch.equal(found, states(shared("gpt2"), [text])[0])


def test_before_an_edit_and_with_a_memory_of_zeros_the_model_is_as_it_was_to_the_bit(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, threshold=0.0)
    base = states(editor.lm, UNSEEN)
    editor.prepare()
    assert hooks_left(editor.lm) == []
    editor.edit(EDITS[0], score=False)
    assert not torch.equal(states(editor.lm, UNSEEN), base)
    load(editor, weight=torch.zeros(64, WIDTH))
    assert torch.equal(states(editor.lm, UNSEEN), base)


def test_a_memory_without_masks_leaves_the_model_as_it_was(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    base = states(editor.lm, UNSEEN)
    editor.edit(EDITS[0], score=False)
    load(editor, weight=torch.zeros(64, WIDTH), columns=torch.zeros(0, K, dtype=torch.int32))
    assert torch.equal(states(editor.lm, UNSEEN), base)
