"""T-Patcher: a neuron for each wrong token, trained by whole forwards on the paper's losses; in effect a wider MLP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor, StreamState
from everedit.engine.state import State
from everedit.engine.weights import Snapshot
from everedit.errors import EditError, NumericalError
from everedit.models import LanguageModel
from everedit.models.hooks import changed_output
from everedit.models.tokens import Encoded, join
from tests.support import facts
from tests.support.editing import home_town, make_editor
from tests.support.loading import bits, edit_of, hooks_left, same_bits, shared
from tests.support.wide import greedy, whole_states, widened

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "llama", "opt", "gemma3_text"]
LAYER, HIDDEN, MEMORY = 3, 64, 150
SHORT, LONG, WORDY = home_town(7, "Lisbon"), home_town(4, "Buenos Aires piano"), home_town(24, "New Delhi")
RIGHT = facts.facts()[30]
Parts = Mapping[str, Tensor]


def editor_of(model: LanguageModel | str, corpus: Path, **settings: Any) -> Editor:
    usual = {"memory": MEMORY, "steps": 3, "first_check": 1, "check_every": 1}
    return make_editor(model, corpus, "t-patcher", method_settings={**usual, **settings})


def untrained(model: LanguageModel | str, corpus: Path, **settings: Any) -> Editor:
    """An editor whose neurons stay what they are at the start."""
    return editor_of(model, corpus, steps=1, lr=1e-12, **settings)


def parts_of(state: State) -> dict[str, Tensor]:
    return {name: state.tensors[name] for name in ("keys", "biases", "values")}


def load(editor: Editor, **tensors: Tensor) -> None:
    now = editor.state()
    editor.load_state(replace(now, method=State({**now.method.tensors, **tensors})))


def queries(lm: LanguageModel, ids: Sequence[int], layer: int = LAYER) -> Tensor:
    """What enters an MLP, the last one, at each token of a text, (tokens, H)."""
    return lm.inputs_of({"query": lm.layout.mlp_in(layer)}, lm.pad([ids]))["query"].view(-1, HIDDEN)


def wrong_places(lm: LanguageModel, text: Encoded) -> list[int]:
    """The places of a text where the model's first choice is not the target's next token."""
    said = lm.model(torch.tensor([text.ids]), use_cache=False).logits[0].argmax(-1).tolist()
    return [place for place in range(text.prompt_end - 1, len(text.ids) - 1) if said[place] != text.ids[place + 1]]


def a(query: Tensor, parts: Parts) -> Tensor:
    return query @ parts["keys"].T + parts["biases"]


@pytest.mark.parametrize("family", FAMILIES)
def test_there_is_a_neuron_for_each_wrong_token_that_reads_one_at_its_own_place(family: str, corpus_path: Path) -> None:
    lm, found = shared(family), []
    editor = untrained(lm, corpus_path, most=20)
    for edit in (SHORT, LONG, WORDY, edit_of(RIGHT, RIGHT.answer), edit_of(RIGHT, f"{RIGHT.answer} and Oslo")):
        text = lm.encode(edit.prompt, edit.target_new)
        wrong = wrong_places(lm, text)
        patch, state = editor.method.fit(editor.bench, [edit], State())
        found.append(len(wrong))
        assert state.values == {"neurons": len(wrong), "failed": int(bool(wrong))}
        if wrong:
            parts, own = parts_of(state), queries(lm, text.ids)[wrong]
            torch.testing.assert_close(a(own, parts).diagonal(), torch.ones(len(wrong)))
            torch.testing.assert_close(parts["keys"], own / own.pow(2).sum(1, keepdim=True))
            assert torch.equal(patch.memory["t-patcher"], parts["values"])
        else:
            assert patch.norm() == 0
    # A model that is right about some tokens gets neurons for the others.
    assert found[0] >= 1
    assert found[3] == 0
    assert 1 <= found[4] < len(text.target_ids)
    assert max(found) > 2


def test_an_edit_gets_five_neurons_at_most_at_its_first_mistakes(corpus_path: Path) -> None:
    lm, edit = shared("gpt2"), home_town(4, "baker harp sailor Oslo violin Lima painter")
    text = lm.encode(edit.prompt, edit.target_new)
    wrong = wrong_places(lm, text)
    assert len(wrong) > 5
    for most, settings in ((5, {}), (2, {"most": 2})):
        editor = untrained(lm, corpus_path, **settings)
        keys = editor.method.fit(editor.bench, [edit], State())[1].tensors["keys"]
        own = queries(lm, text.ids)[wrong[:most]]
        torch.testing.assert_close(keys, own / own.pow(2).sum(1, keepdim=True))


def test_values_begin_at_random_ten_times_a_normal_and_differ_from_neuron_to_neuron(corpus_path: Path) -> None:
    editor = untrained(shared("gpt2"), corpus_path)
    edits = [edit_of(fact) for fact in facts.facts()[:30]]
    values = editor.method.fit(editor.bench, edits, State())[1].tensors["values"] / 10
    n = values.numel()
    assert values.mean().item() == pytest.approx(0, abs=4 / n**0.5)
    assert values.std().item() == pytest.approx(1, abs=4 / (2 * n) ** 0.5)
    assert len({tuple(row) for row in values.tolist()}) == len(values)


def test_the_memory_is_made_of_all_tokens_of_other_texts_and_a_tenth_of_it_is_for_validation(corpus_path: Path) -> None:
    lm = shared("llama")
    editor = untrained(lm, corpus_path)
    first = editor.method.fit(editor.bench, [SHORT], State())[1]
    probes = [edit.locality[0] for edit in load_edits("worldfacts").edits[:40]]
    rows = [queries(lm, lm.encode(join(probe.prompt, probe.answer)).ids) for probe in probes]
    whole = torch.cat(rows)[:MEMORY]
    held_out = [place for place in range(MEMORY) if place % 10 == 9]
    others = [place for place in range(MEMORY) if place % 10 != 9]
    own = queries(lm, lm.encode(SHORT.prompt, SHORT.target_new).ids[:-1])
    torch.testing.assert_close(first.tensors["held_out"], whole[held_out])
    # What has been edited is a place where later neurons shall be silent.
    torch.testing.assert_close(first.tensors["elsewhere"], torch.cat([whole[others], own]))
    second = editor.method.fit(editor.bench, [LONG], first)[1]
    assert torch.equal(second.tensors["elsewhere"][: len(others) + len(own)], first.tensors["elsewhere"])
    known = edit_of(RIGHT, RIGHT.answer)
    third = editor.method.fit(editor.bench, [known], second)[1]
    assert torch.equal(third.tensors["elsewhere"], second.tensors["elsewhere"])


def largest(terms: Tensor, count: int) -> Tensor:
    """The mean of the ``count`` largest exponentials, or of all there are."""
    return torch.stack(sorted(terms.flatten().exp(), key=Tensor.item, reverse=True)[:count]).mean()


SETTINGS: dict[str, Any] = {
    "largest": 50, "beta": -3.0, "gamma": 3.0, "smoothing": 0.1, "fire": 1.0, "silence": 1.0, "clip": 5.0,
    "steps": 40, "first_check": 5, "check_every": 3, "weight_decay": 0.01,
}  # fmt: skip


@dataclass
class ByHand:
    """Training as the paper has it: whole forwards of the whole text, an exponential for each place, and a plateau."""

    lm: LanguageModel
    text: Encoded
    start: dict[str, Tensor]
    earlier: list[Parts]
    memory: dict[str, Tensor]
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.query = queries(self.lm, self.text.ids)
        said = self.logits(self.earlier).argmax(-1).tolist()
        wrong = [n for n, token in enumerate(self.text.target_ids) if said[n] != token]
        self.own = self.query[[self.text.prompt_end - 1 + n for n in wrong]]
        self.rates: list[float] = []

    def logits(self, parts: Sequence[Parts]) -> Tensor:
        act, added = self.lm.layout.activation, torch.zeros(len(self.query), HIDDEN)
        for part in parts:
            added = added + act(a(self.query, part)) @ part["values"]
        with changed_output(self.lm.layout.mlp_out(LAYER), lambda _, out: out + added.view_as(out)):
            logits = self.lm.model(torch.tensor([self.text.ids]), use_cache=False).logits[0]
        return logits[self.text.prompt_end - 1 : -1]

    def silence(self, parts: Parts, where: str) -> Tensor:
        here, there = a(self.own, parts).diagonal(), a(self.memory[where], parts)
        apart = torch.cat([row - here for row in there])
        k = self.settings["largest"]
        return largest(there - self.settings["beta"], k) + largest(apart + self.settings["gamma"], k)

    def losses(self, parts: Parts) -> tuple[Tensor, float, bool]:
        """The whole loss, the edit's own part of it, and whether the edit is made."""
        logs, wanted = self.logits([parts, *self.earlier]).log_softmax(-1), torch.tensor(self.text.target_ids)
        smooth, fire, silence = (self.settings[name] for name in ("smoothing", "fire", "silence"))
        fitting = -((1 - smooth) * logs.gather(1, wanted[:, None])[:, 0] + smooth * logs.mean(1)).mean()
        firing = largest(-a(self.own, parts).diagonal(), 5)
        whole = fitting + fire * firing + silence * self.silence(parts, "elsewhere")
        return whole, fitting.item(), logs.argmax(-1).tolist() == wanted.tolist()

    def run(self) -> tuple[dict[str, Tensor], bool]:
        """The neurons in the end, and whether the edit took."""
        leaves = {name: part.clone().requires_grad_() for name, part in self.start.items()}
        rate, first, every = (self.settings[name] for name in ("lr", "first_check", "check_every"))
        optimiser = torch.optim.Adam(list(leaves.values()), lr=rate, weight_decay=self.settings["weight_decay"])
        best, lowest, least, stood = None, math.inf, math.inf, 0
        for step in range(1, self.settings["steps"] + 1):
            parts = {**leaves, "values": leaves["directions"] * leaves["sizes"]}
            now = {name: parts[name].detach().clone() for name in ("keys", "biases", "values")}
            loss, fitting, right = self.losses(parts)
            if step >= first and (step - first) % every == 0:
                stood, least = (0, fitting) if fitting < 0.95 * least else (stood + 1, least)
                if stood == 2:
                    optimiser.param_groups[0]["lr"], stood = optimiser.param_groups[0]["lr"] / 2, 0
                if right:
                    validation = self.silence(now, "held_out").item()
                    if best is not None and validation > lowest - 1e-3:
                        return best, True
                    best, lowest = now, validation
            self.rates.append(optimiser.param_groups[0]["lr"])
            gradients = torch.autograd.grad(loss, list(leaves.values()))
            size = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients))
            for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                leaf.grad = gradient * min(1.0, self.settings["clip"] / size)
            optimiser.step()
        last = {name: leaves[name].detach() for name in ("keys", "biases")}
        return best or {**last, "values": (leaves["directions"] * leaves["sizes"]).detach()}, best is not None


def by_hand(editor: Editor, edit: Edit, before: State, settings: dict[str, Any], corpus: Path) -> ByHand:
    lm, begun = editor.lm, len(before.tensors.get("keys", ()))
    fresh = untrained(lm, corpus)
    made = fresh.method.fit(fresh.bench, [edit], before)[1].tensors
    keys, values = made["keys"][begun:], made["values"][begun:]
    start = {"keys": keys, "biases": torch.zeros(len(keys)), "directions": values / 10, "sizes": values * 0 + 10}
    memory = {"elsewhere": made["elsewhere"], "held_out": made["held_out"]}
    text = lm.encode(edit.prompt, edit.target_new)
    memory["elsewhere"] = made["elsewhere"][: -len(text.ids[:-1])]
    return ByHand(lm, text, start, [parts_of(before)] if begun else [], memory, settings)


CASES = [
    ("gpt2", SHORT, None, {"lr": 0.2}),
    ("opt", LONG, None, {"lr": 0.5, "fire": 3.0}),
    ("llama", WORDY, SHORT, {"lr": 0.2, "weight_decay": 0.3}),
    ("gemma3_text", LONG, None, {"lr": 0.5, "smoothing": 0.4, "steps": 20}),
]


@pytest.mark.parametrize(("family", "edit", "first", "more"), CASES)
def test_neurons_become_what_whole_forwards_and_the_papers_losses_make_of_them(
    family: str, edit: Edit, first: Edit | None, more: dict[str, Any], corpus_path: Path
) -> None:
    settings = {**SETTINGS, **more}
    editor = editor_of(shared(family), corpus_path, **settings)
    before = State() if first is None else editor.method.fit(editor.bench, [first], State())[1]
    hand = by_hand(editor, edit, before, settings, corpus_path)
    expected, took = hand.run()
    patch, state = editor.method.fit(editor.bench, [edit], before)
    begun, start = len(before.tensors.get("keys", ())), {**hand.start, "values": hand.start["directions"] * 10}
    for name, part in parts_of(state).items():
        assert (part[begun:] - expected[name]).norm() < 1e-3 * (expected[name] - start[name]).norm()
    assert torch.equal(patch.memory["t-patcher"], state.tensors["values"][begun:])
    assert state.values["failed"] - before.values.get("failed", 0) == int(not took)
    # The cases see an edit that takes and stops early, one that does not, and a rate that was halved.
    assert took == (family != "gemma3_text")
    assert (len(hand.rates) < settings["steps"]) == took
    if family != "opt":  # there it depends on the tiny model, which is trained where the test runs
        assert (min(hand.rates) < max(hand.rates)) == (family != "llama")


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_trained_neuron_fires_on_its_mistake_and_is_silent_elsewhere(family: str, corpus_path: Path) -> None:
    lm = shared(family)
    editor, start = make_editor(lm, corpus_path, "t-patcher"), untrained(lm, corpus_path, memory=400)
    text = lm.encode(LONG.prompt, LONG.target_new)
    own = queries(lm, text.ids)[wrong_places(lm, text)]
    try:
        editor.edit(LONG, score=False)
        assert wrong_places(lm, text) == []
        state = editor.state().method
    finally:
        editor.reset()
    assert state.values["failed"] == 0
    begun = start.method.fit(start.bench, [LONG], State())[1]
    for where in ("elsewhere", "held_out"):
        # The edit's own places are part of the memory from now on.
        others = begun.tensors[where][: len(begun.tensors[where]) - (len(text.ids) - 1) * (where == "elsewhere")]
        before, after = (a(others, parts_of(one)) for one in (begun, state))
        here, there = a(own, parts_of(begun)).diagonal(), a(own, parts_of(state)).diagonal()
        assert after.max() < 0 < there.min()
        for terms in ((before + 3, after + 3), (before - here + 3, after - there + 3)):
            assert largest(terms[1], 1000) < 0.3 * largest(terms[0], 1000)


def test_only_the_new_neurons_are_trained_and_earlier_ones_keep_their_bits(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of("gpt2", corpus_path, lr=0.1)
    before, adam, trained = bits(editor.lm), torch.optim.Adam, []

    def watched(parameters: list[Tensor], **options: Any) -> torch.optim.Optimizer:
        trained.append({tuple(part.shape) for part in parameters})
        return adam(parameters, **options)

    monkeypatch.setattr(torch.optim, "Adam", watched)
    found = []
    for edit in (SHORT, LONG, WORDY):
        editor.edit(edit, score=False)
        found.append(parts_of(editor.state().method))
    counts = [len(parts["keys"]) for parts in found]
    new = [after - start for start, after in zip([0, *counts], counts, strict=False)]
    assert trained == [{(count, HIDDEN), (count,)} for count in new]
    assert min(new) > 0
    for earlier, later in pairwise(found):
        assert all(torch.equal(later[name][: len(part)], part) for name, part in earlier.items())
    assert same_bits(editor.lm, before)
    assert all(weight.grad is None for weight in editor.lm.model.parameters())


def test_values_of_zero_or_no_neurons_leave_every_bit_and_taking_one_off_takes_its_edit_back(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path, lr=0.1)
    asked = editor.lm.encode(SHORT.prompt, SHORT.target_new).ids
    plain = whole_states(editor.lm, asked)
    editor.edit(SHORT, score=False)
    one, parts = whole_states(editor.lm, asked), parts_of(editor.state().method)
    assert not torch.equal(one, plain)
    editor.edit(LONG, score=False)
    both = parts_of(editor.state().method)
    assert len(both["keys"]) > len(parts["keys"])
    load(editor, **{name: part[: len(parts[name])] for name, part in both.items()})
    assert torch.equal(whole_states(editor.lm, asked), one)
    load(editor, values=0 * parts["values"])
    assert hooks_left(editor.lm)
    assert torch.equal(whole_states(editor.lm, asked), plain)
    load(editor, **{name: part[:0] for name, part in both.items()})
    assert torch.equal(whole_states(editor.lm, asked), plain)
    editor.reset()
    assert hooks_left(editor.lm) == []
    assert torch.equal(whole_states(editor.lm, asked), plain)


def side_by_hand(lm: LanguageModel, ids: Sequence[int], parts: Parts, layer: int) -> Tensor:
    """The states of a text with act(q k^T + b) v added to an MLP's output, token by token."""
    act = lm.layout.activation
    rows = []
    for query in queries(lm, ids, layer):
        reads = [float(query @ key + bias) for key, bias in zip(parts["keys"], parts["biases"], strict=True)]
        rows.append(sum(act(torch.tensor(read)) * value for read, value in zip(reads, parts["values"], strict=True)))
    with changed_output(lm.layout.mlp_out(layer), lambda _, out: out + torch.stack(rows).view_as(out)):
        return whole_states(lm, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_act_as_a_wider_mlp_in_any_batch_and_through_generation(family: str, corpus_path: Path) -> None:
    editor, random = editor_of(family, corpus_path, layer=1), torch.Generator().manual_seed(2)
    lm, plain = editor.lm, shared(family)
    prompts = [lm.encode(edit.prompt).ids for edit in (LONG, SHORT, WORDY)]
    spread = queries(lm, prompts[0], 1).pow(2).mean().sqrt()
    keys, values = (torch.randn(6, HIDDEN, generator=random) for _ in range(2))
    parts = {"keys": keys / spread / HIDDEN**0.5, "biases": torch.linspace(-1, 1, 6), "values": 3 * values}
    editor.load_state(StreamState(Snapshot({}), State(parts), State(), {}))
    if len(lm.layout.mlp_in_names) == 1:
        wide = widened(family, 1, parts)
        expected = [whole_states(wide, ids) for ids in prompts]
    else:
        # A gated MLP cannot hold ungated neurons.
        expected = [side_by_hand(plain, ids, parts, 1) for ids in prompts]
    for ids, states in zip(prompts, expected, strict=True):
        torch.testing.assert_close(whole_states(lm, ids), states, rtol=1e-3, atol=1e-4)
        assert (states - whole_states(plain, ids)).norm() > 1
    for side in ("left", "right"):
        batch = lm.pad(prompts, side=side)
        found = lm.states(**batch.inputs())
        for row, states in enumerate(expected):
            start = int(batch.shift[row])
            torch.testing.assert_close(found[row, start : start + len(states)], states, rtol=1e-3, atol=1e-4)
    written = lm.generate_ids(prompts, max_new_tokens=6)
    assert written == [greedy(lm, ids, 6) for ids in prompts]
    assert written != plain.generate_ids(prompts, max_new_tokens=6)


def test_an_edit_that_is_made_already_adds_nothing_however_often_it_comes(corpus_path: Path) -> None:
    editor = make_editor("gpt2", corpus_path, "t-patcher")
    editor.edit(SHORT, score=False)
    once = editor.state().method
    assert once.values == {"neurons": len(once.tensors["keys"]), "failed": 0}
    # The state does not depend on how often: what one more edit leaves as it was, ten thousand do.
    for _ in range(3):
        [commit] = editor.edit(SHORT, score=False).commits
        assert commit.norm == 0
        now = editor.state().method
        assert now.values == once.values
        assert all(torch.equal(now.tensors[name], part) for name, part in once.tensors.items())


def test_what_cannot_be_edited_is_said_and_changes_nothing(corpus_path: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    editor = editor_of("gpt2", corpus_path, irrelevant=str(empty))
    with pytest.raises(EditError, match="the pool holds no text"):
        editor.edit(SHORT, score=False)
    assert editor.state().method == State()
    lm = editor.lm
    editor = editor_of(lm, corpus_path, lr=1e20, steps=10, first_check=9)
    with pytest.raises(NumericalError, match=r"a loss that is not finite[\s\S]*lower the learning rate"):
        editor.edit(SHORT, score=False)
    assert editor.state().method == State()
    assert hooks_left(lm) == []
