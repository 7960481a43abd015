"""CaliNet: slots become what Adafactor makes of them by whole forwards, act as a wider MLP, and facts are assessed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.optimization import Adafactor

from everedit.edit import Edit
from everedit.editor import Editor, StreamState
from everedit.engine.assess import contrastive_assessment
from everedit.engine.state import State
from everedit.engine.weights import Snapshot
from everedit.errors import NumericalError
from everedit.methods import calinet
from everedit.models import LanguageModel
from everedit.models.hooks import changed_output
from everedit.models.tokens import Encoded
from tests.support import facts
from tests.support.editing import home_town, losses, make_editor
from tests.support.loading import bits, edit_of, hooks_left, same_bits, shared
from tests.support.wide import greedy, whole_states, widened

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "llama", "opt", "gemma3_text"]
LAYER, HIDDEN, SLOTS = 1, 64, 8
EDITS = [home_town(7, "Lisbon"), home_town(4, "Buenos Aires piano"), home_town(24, "New Delhi")]
Parts = Mapping[str, Tensor]


def editor_of(model: LanguageModel | str, corpus: Path, **settings: Any) -> Editor:
    usual = {"layer": LAYER, "slots": SLOTS, "steps": 3, "contexts": ()}
    return make_editor(model, corpus, "calinet", method_settings={**usual, **settings})


def load(editor: Editor, parts: Parts) -> None:
    editor.load_state(StreamState(Snapshot({}), State(dict(parts)), State(), {}))


def query_of(lm: LanguageModel, ids: Sequence[int]) -> Tensor:
    """What enters the layer's MLP, (tokens, H)."""
    return lm.inputs_of({"query": lm.layout.mlp_in(LAYER)}, lm.pad([ids]))["query"].view(-1, HIDDEN)


def made_up(lm: LanguageModel, gated: bool, count: int = 6) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    size = query_of(lm, lm.encode(EDITS[0].prompt).ids).pow(2).mean().sqrt() * HIDDEN**0.5
    names = ["keys", "gates"] if gated else ["keys"]
    parts = {name: torch.randn(count, HIDDEN, generator=random) / size for name in names}
    return {**parts, "values": 3 * torch.randn(count, HIDDEN, generator=random)}


def added(query: Tensor, parts: Parts, act: Any) -> Tensor:
    """What slots add at each token, slot by slot."""
    total = torch.zeros_like(query)
    for number, value in enumerate(parts["values"]):
        read = query @ parts["keys"][number]
        if "gates" in parts:
            total = total + (act(query @ parts["gates"][number]) * read)[:, None] * value
        else:
            total = total + act(read)[:, None] * value
    return total


def logits_with(lm: LanguageModel, text: Encoded, all_parts: Sequence[Parts], act: Any) -> Tensor:
    """The logits of a text's target tokens, by a whole forward of the whole text."""
    query = query_of(lm, text.ids)
    more = torch.stack([added(query, parts, act) for parts in all_parts]).sum(0)
    with changed_output(lm.layout.mlp_out(LAYER), lambda _, out: out + more.view_as(out)):
        logits = lm.model(torch.tensor([text.ids]), use_cache=False).logits[0]
    return logits[text.prompt_end - 1 : -1]


@pytest.mark.parametrize(
    ("family", "settings"),
    [*((family, {}) for family in FAMILIES), ("gpt2", {"gated": True}), ("llama", {"gated": False})],
)
def test_slots_act_as_a_wider_mlp_in_any_batch_and_through_generation(
    family: str, settings: dict[str, Any], corpus_path: Path
) -> None:
    editor, plain = editor_of(family, corpus_path, **settings), shared(family)
    own = len(plain.layout.mlp_in_names) > 1
    lm, parts = editor.lm, made_up(plain, settings.get("gated", own))
    prompts = [lm.encode(edit.prompt).ids for edit in EDITS]
    load(editor, parts)
    if ("gates" in parts) == own:
        wide = widened(family, LAYER, parts)
        expected = [whole_states(wide, ids) for ids in prompts]
    else:
        expected = []
        for ids in prompts:
            more = added(query_of(plain, ids), parts, plain.layout.activation)
            with changed_output(plain.layout.mlp_out(LAYER), lambda _, out, more=more: out + more.view_as(out)):
                expected.append(whole_states(plain, ids))
    for ids, states in zip(prompts, expected, strict=True):
        torch.testing.assert_close(whole_states(lm, ids), states, rtol=1e-3, atol=2e-4)
        assert (states - whole_states(plain, ids)).norm() > 1
    for side in ("left", "right"):
        batch = lm.pad(prompts, side=side)
        found = lm.states(**batch.inputs())
        for row, states in enumerate(expected):
            start = int(batch.shift[row])
            torch.testing.assert_close(found[row, start : start + len(states)], states, rtol=1e-3, atol=1e-3)
    written = lm.generate_ids(prompts, max_new_tokens=6)
    assert written == [greedy(lm, ids, 6) for ids in prompts]
    assert written != plain.generate_ids(prompts, max_new_tokens=6)


ACTIVATIONS: list[tuple[str, dict[str, Any], bool, Callable[[Tensor], Tensor]]] = [
    ("gpt2", {}, False, partial(F.gelu, approximate="tanh")),
    ("gpt2", {"activation": "relu", "gated": True}, True, F.relu),
    ("llama", {}, True, F.silu),
    ("llama", {"activation": "relu"}, True, F.relu),
    ("llama", {"gated": False}, False, F.silu),
]


def test_the_activation_is_the_models_or_relu_and_the_slots_are_gated_as_the_model_is(corpus_path: Path) -> None:
    for family, settings, gated, act in ACTIVATIONS:
        lm = shared(family)
        editor = editor_of(lm, corpus_path, **settings)
        state = editor.method.fit(editor.bench, EDITS[:1], State())[1]
        assert ("gates" in state.tensors) == gated
        parts, query = made_up(lm, gated), query_of(lm, lm.encode(EDITS[0].prompt).ids)
        memory: Any = editor.method.memory(editor.bench, State(parts))
        torch.testing.assert_close(memory.added(query), added(query, parts, act), rtol=1e-3, atol=2e-3)


def test_values_of_zero_or_no_slots_leave_every_bit(corpus_path: Path) -> None:
    editor = editor_of("llama", corpus_path)
    lm, asked = editor.lm, editor.lm.encode(EDITS[0].prompt).ids
    plain, parts = whole_states(lm, asked), made_up(shared("llama"), True)
    load(editor, parts)
    assert not torch.equal(whole_states(lm, asked), plain)
    for other in ({**parts, "values": 0 * parts["values"]}, {name: part[:0] for name, part in parts.items()}):
        load(editor, other)
        assert hooks_left(lm)
        assert torch.equal(whole_states(lm, asked), plain)
    editor.reset()
    assert hooks_left(lm) == []
    assert torch.equal(whole_states(lm, asked), plain)


def test_new_slots_begin_as_a_linear_layer_does_with_values_of_zero(corpus_path: Path) -> None:
    editor = editor_of(shared("llama"), corpus_path, slots=200, steps=1, lr=1e-12)
    first = editor.method.fit(editor.bench, EDITS[:1], State())[1]
    both = editor.method.fit(editor.bench, EDITS[1:], first)[1]
    assert both.tensors["values"].abs().max() < 1e-9
    bound, rows = HIDDEN**-0.5, []
    for name in ("keys", "gates"):
        rows += both.tensors[name].split(200)
        assert 0.99 * bound < both.tensors[name].abs().max() <= bound
        assert both.tensors[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    # Keys and gates, earlier and later slots: four draws.
    assert len({tuple(part[0].tolist()) for part in rows}) == 4


@torch.enable_grad()
def by_hand(
    lm: LanguageModel, texts: Sequence[Encoded], start: Parts, earlier: Sequence[Parts], steps: int
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """The slots before and after each step, and the losses there: the mean over texts of each one's mean loss."""
    leaves = {name: part.clone().requires_grad_() for name, part in start.items()}
    optimiser = Adafactor(list(leaves.values()), lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False)
    found, seen = [], []
    for _ in range(steps + 1):
        found.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
        each = []
        for text in texts:
            logits = logits_with(lm, text, [leaves, *earlier], lm.layout.activation)
            each.append(F.cross_entropy(logits, torch.tensor(text.target_ids)))
        loss = torch.stack(each).mean()
        seen.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return found, seen


@pytest.mark.parametrize(
    ("family", "settings", "begun"),
    [("gpt2", {}, False), ("llama", {}, True), ("opt", {"contexts": [[6, 2]]}, False), ("gemma3_text", {}, True)],
)
def test_slots_become_what_adafactor_makes_of_them_by_whole_forwards(
    family: str, settings: dict[str, Any], begun: bool, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two rows a pass: parts of unequal size must weigh as their texts do.
    monkeypatch.setattr(calinet, "_ROWS_A_STEP", 2)
    lm = shared(family)
    editor = editor_of(lm, corpus_path, **settings)
    untrained = editor_of(lm, corpus_path, **settings, steps=1, lr=1e-12)
    state = editor.method.fit(editor.bench, [home_town(0)], State())[1] if begun else State()
    count = len(state.tensors.get("keys", ()))
    begin = untrained.method.fit(untrained.bench, EDITS, state)[1].tensors
    start = {name: begin[name][count:] * (name != "values") for name in begin}
    prefixes = editor.method.prefixes(editor.bench)
    texts = [lm.encode(edit.prompt, edit.target_new, prefix=prefix) for edit in EDITS for prefix in prefixes]
    assert len(texts) == (9 if settings else 3)
    slots, seen = by_hand(lm, texts, start, [state.tensors] if begun else [], 4)
    assert seen[4] < seen[3] < seen[2] < seen[0] - 0.1
    # All steps, and three: none is made where the loss stands below stop_loss.
    for steps, stop in ((4, {}), (3, {"stop_loss": (seen[2] + seen[3]) / 2})):
        editor = editor_of(lm, corpus_path, **settings, **stop, steps=4)
        patch, after = editor.method.fit(editor.bench, EDITS, state)
        for name, part in after.tensors.items():
            assert torch.equal(part[:count], state.tensors.get(name, part[:0]))
            way = (slots[steps][name] - slots[0][name]).norm()
            assert (part[count:] - slots[steps][name]).norm() < 1e-2 * way
            assert way > 0.01
        assert torch.equal(patch.memory["calinet"], after.tensors["values"][count:])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_facts_are_learned_in_all_their_wordings_and_nothing_but_slots_is_trained(
    family: str, corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, adafactor = [], calinet._adafactor

    def watched(parts: list[Tensor], lr: float) -> torch.optim.Optimizer:
        made.append(adafactor(parts, lr))
        return made[-1]

    monkeypatch.setattr(calinet, "_adafactor", watched)
    editor = editor_of(family, corpus_path, steps=100, contexts=[[6, 2]], stop_loss=0.05)
    lm, before = editor.lm, bits(editor.lm)
    editor.edit(EDITS, score=False)
    assert same_bits(lm, before)
    assert all(weight.grad is None and not weight.requires_grad for weight in lm.model.parameters())
    tensors, [optimiser] = editor.state().method.tensors, made
    assert {part.data_ptr() for part in optimiser.state} == {part.data_ptr() for part in tensors.values()}
    prefixes = editor.method.prefixes(editor.bench)
    assert len(set(prefixes)) == 3
    texts = [edit.model_copy(update={"prompt": prefix + edit.prompt}) for edit in EDITS for prefix in prefixes]
    assert max(losses(lm, texts)) < 0.1
    for edit in EDITS:
        assert lm.tokenizer.decode(lm.encode(edit.prompt, edit.target_new).target_ids).strip() == edit.target_new
        assert lm.generate([edit.prompt], max_new_tokens=8)[0].strip().startswith(edit.target_new)


def test_what_the_model_says_already_gets_no_slots_however_often_it_comes(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of("gpt2", corpus_path, steps=100, contexts=[[6, 2]], stop_loss=0.1)
    run = []
    tail = calinet.Tail.of
    monkeypatch.setattr(calinet.Tail, "of", lambda lm, texts, layer: run.append(len(texts)) or tail(lm, texts, layer))
    # The same edit ten thousand times is that edit.
    [commit] = editor.edit([EDITS[0]] * 10_000, score=False).commits
    once = editor.state().method
    assert run == [3]
    assert len(once.tensors["keys"]) == SLOTS
    assert losses(editor.lm, EDITS[:1])[0] < 0.2
    assert commit.norm > 0
    [commit] = editor.edit(EDITS[0], score=False).commits
    assert commit.norm == 0
    assert all(torch.equal(editor.state().method.tensors[name], part) for name, part in once.tensors.items())


def test_a_loss_that_is_not_finite_is_said_and_loses_nothing(corpus_path: Path) -> None:
    editor = editor_of("gpt2", corpus_path)
    editor.edit(EDITS[0], score=False)
    before, asked = editor.state(), editor.lm.encode(EDITS[0].prompt).ids
    states = whole_states(editor.lm, asked)
    wild = type(editor.method)(editor.method.config.model_copy(update={"lr": 1e30, "steps": 9}))
    with editor.using(wild), pytest.raises(NumericalError, match="not finite"):
        editor.edit(EDITS[1:], score=False)
    assert editor.state().method is before.method
    assert torch.equal(whole_states(editor.lm, asked), states)


# --------------------------------------------------------------------------- contrastive knowledge assessment


def chance(lm: LanguageModel, prompt: str, answer: str) -> float:
    """P(o | prompt) of the answer's first token, in Python's own numbers."""
    start = lm.encode(prompt).ids
    token = lm.encode(prompt, answer).ids[len(start)]
    logits = lm.model(torch.tensor([start]), use_cache=False).logits[0, -1].double()
    return float((logits - logits.logsumexp(0)).exp()[token])


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "t5"])
def test_the_assessment_is_the_ratio_of_the_answers_chances(family: str) -> None:
    lm, fact = shared(family), facts.facts()[0]
    others = [facts.TEMPLATES[relation][0].format(fact.subject) for relation in (facts.PROFESSION, facts.INSTRUMENT)]
    if lm.layout.is_decoder_only:
        ours, *theirs = (chance(lm, prompt, fact.answer) for prompt in (fact.prompt, *others))
    else:
        source = [torch.tensor([lm.tokenizer(prompt).input_ids]) for prompt in (fact.prompt, *others)]
        token = lm.encode(fact.prompt, fact.answer).target_ids[0]
        start = torch.tensor([[lm.model.config.decoder_start_token_id]])
        rows = [lm.model(input_ids=ids, decoder_input_ids=start).logits[0, -1].softmax(0) for ids in source]
        ours, *theirs = (float(row[token]) for row in rows)
    for a, b in ((0.0, 0.0), (0.1, 0.3)):
        expected = (ours + a) / (sum(theirs) / 2 + b)
        found = contrastive_assessment(lm, fact.prompt, others, fact.answer, a=a, b=b)
        assert found == pytest.approx(expected, rel=1e-3)
        assert found > 1
    wrong = contrastive_assessment(lm, others[0], [fact.prompt], fact.answer)
    assert wrong == pytest.approx(theirs[0] / ours, rel=1e-3)
    assert wrong < 1
    same = contrastive_assessment(lm, fact.prompt, [fact.prompt] * 3, fact.answer)
    assert same == pytest.approx(1, abs=1e-6)


def test_a_factor_of_all_chances_changes_an_assessment_only_with_smoothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, fact = shared("gpt2"), facts.facts()[0]
    other, theirs = facts.facts()[1].prompt, LanguageModel.logits

    def halved(self: LanguageModel, states: Tensor) -> Tensor:
        """The logits of a model that says a token of no answer half of the time, and else what it said."""
        chances = theirs(self, states).softmax(-1) / 2
        return torch.cat([chances[..., :1] + 0.5, chances[..., 1:]], dim=-1).log()

    def both() -> list[float]:
        return [contrastive_assessment(lm, fact.prompt, [other], fact.answer, a=a, b=a) for a in (0.0, 0.1)]

    plain = both()
    monkeypatch.setattr(LanguageModel, "logits", halved)
    now = both()
    assert now[0] == pytest.approx(plain[0], rel=1e-4)
    assert now[1] != pytest.approx(plain[1], rel=0.1)


def test_with_assess_what_the_model_prefers_already_is_left_alone(
    corpus_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, theirs = [], calinet.contrastive_assessment

    def watched(lm: LanguageModel, prompt: str, negatives: Sequence[str], answer: str) -> float:
        asked.append((prompt, list(negatives), answer))
        return theirs(lm, prompt, negatives, answer)

    monkeypatch.setattr(calinet, "contrastive_assessment", watched)
    fact, pool = facts.facts()[0], tmp_path / "pool.jsonl"
    others = [(other.subject, prompt) for other in facts.facts()[3:9] for prompt in (other.prompt, other.rephrase)]
    records = [{"prompt": prompt, "subject": subject, "target_new": "x"} for subject, prompt in others]
    pool.write_text("".join(json.dumps(record) + "\n" for record in [{"prompt": "A", "target_new": "B"}, *records]))
    templates = [template for pair in facts.TEMPLATES.values() for template in pair]
    known, false = edit_of(fact, fact.answer), edit_of(fact, "clock maker")
    editor = editor_of("gpt2", corpus_path, assess=True, negatives=4, irrelevant=str(pool))
    # Without a subject nothing can be put into other prompts, and the edit is made.
    editor.edit([known, Edit(prompt=fact.rephrase, target_new=fact.answer)], score=False)
    assert editor.state().method.values == {"left_alone": 1}
    assert len(editor.state().method.tensors["keys"]) == SLOTS
    editor.edit([known, false, known], score=False)
    assert editor.state().method.values == {"left_alone": 2}
    assert len(editor.state().method.tensors["keys"]) == 2 * SLOTS
    assert {answer for *_, answer in asked} == {known.target_new, false.target_new}
    for prompt, negatives, _ in asked:
        assert (prompt, len(set(negatives))) == (fact.prompt, 4)
        assert set(negatives) < {template.format(fact.subject) for template in templates} - {prompt}
