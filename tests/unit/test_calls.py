"""What a memory decides for a prompt holds until its sequence ends: made-up memories against whole texts and a hook."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig

from everedit.edit import Probe
from everedit.editor import Editor, StreamState
from everedit.engine.state import State
from everedit.engine.weights import Snapshot
from everedit.evaluation.read import read
from everedit.experiments.folder import RunFolder
from everedit.methods.memoir import TopHash
from everedit.models import LanguageModel
from everedit.models.calls import decisions_of, keep_decisions, watching
from everedit.models.hooks import changed_output
from everedit.models.layout import oriented
from everedit.models.model import Speaker
from everedit.models.prefill import Prefill
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import DECODERS, bits, fresh, hooks_left, same_bits, shared
from tests.support.wide import whole_states

pytestmark = pytest.mark.usefixtures("own_cache")

CASES = [("grace", "llama"), ("memoir", "gemma3_text"), ("wise", "gpt2"), ("grace", "opt"), ("wise", "llama")]
LAYER, HIDDEN, WIDTH, K = 1, 64, 256, 60
PROMPTS = {7: "Lisbon", 24: "New Delhi", 4: "Oslo and Lima", 17: "fire fighter", 1: "Buenos Aires piano", 0: "baker"}
SETTINGS: dict[str, Any] = {"memoir": {"threshold": 0.9, "k": K}, "wise": {"memories": "retrieve", "ratio": 1}}
TOKENS = "teacher-forced/token-accuracy@1"
Ids = tuple[int, ...]
close = partial(torch.testing.assert_close, rtol=2e-3, atol=2e-3)


def tokens(lm: LanguageModel) -> tuple[list[Ids], list[Ids]]:
    both = [lm.encode(home_town(person).prompt, text) for person, text in PROMPTS.items()]
    return [row.ids[: row.prompt_end] for row in both], [row.target_ids for row in both]


@dataclass
class Attached:
    """An editor with a made-up memory, and what its texts should be."""

    editor: Editor
    kind: str

    def __post_init__(self) -> None:
        self.lm, self.entry = self.editor.lm, cache(self.decided)
        self.prompts, self.texts = tokens(self.lm)
        state = self.made_up(torch.Generator().manual_seed(1), [self.through_layer(row) for row in self.prompts])
        self.editor.load_state(StreamState(Snapshot({}), state, State(), {}))
        self.memory: Any = self.editor.method.memory(self.editor.bench, state)

    def through_layer(self, ids: Ids) -> tuple[Tensor, Tensor]:
        """What enters the layer's down projection and what comes out of it, (tokens, …), before any memory."""
        module = self.lm.layout.mlp_out(LAYER)
        keys = self.lm.inputs_of({"key": module}, self.lm.pad([ids]))["key"].view(-1, WIDTH)
        return keys, F.linear(keys, oriented(module), module.bias)

    def made_up(self, random: torch.Generator, layers: list[tuple[Tensor, Tensor]]) -> State:
        """A state whose memory answers some of the prompts, in different ways."""
        if self.kind == "grace":
            # The end of the fourth prompt's text is a key too: whoever asks again there gets another answer.
            ends = [*layers[:3], self.through_layer(self.prompts[3] + self.texts[3])]
            keys, values = torch.stack([keys[-1] for keys, _ in ends]), 4 * torch.randn(4, HIDDEN, generator=random)
            return State({"keys": keys, "values": values, "radii": torch.full((4,), 0.01), "labels": torch.zeros(4, 1)})
        if self.kind == "memoir":
            places, zeros = torch.randperm(WIDTH, generator=random), torch.zeros(WIDTH)
            make, weight = TopHash(zeros, places, K, "mean").columns, torch.randn(HIDDEN, WIDTH, generator=random)
            columns = [make(keys[None], torch.ones(1, len(keys)).bool()) for keys, _ in layers[:3]]
            return State({"weight": weight, "columns": torch.cat(columns), "places": places, "background": zeros})
        act, done = self.lm.layout.activation, torch.randn(2, HIDDEN, WIDTH, generator=random) / 2
        moved = [[(act(out + keys @ w.T) - act(out)).norm(dim=-1).mean().item() for w in done] for keys, out in layers]
        limits = torch.tensor(moved).sort(0).values[2:4].mean(0)
        shelf = {"filling": 0 * done[0], "mask": done[0] > 9, "full": done[:0], "full_thresholds": limits[:0]}
        return State(shelf | {"done": done, "done_thresholds": limits}, {"edits": 9, "threshold": torch.inf})

    def decided(self, ids: Ids, start: int = 0) -> int:
        """What is decided on the tokens from ``start`` on."""
        keys, values = (part[None, start:] for part in self.through_layer(ids))
        real = torch.ones(keys.shape[:2], dtype=torch.bool)
        seen = {"grace": (keys[:, -1],), "memoir": (keys, real), "wise": (keys, values, real)}
        return int(self.memory.chosen(*seen[self.kind]))

    def states(self, ids: Ids, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """The states (tokens, H) with an entry in force from start to end of each of some spans."""

        def change(key: Tensor, output: Tensor) -> Tensor:
            rows, new, memory = key.view(-1, WIDTH), output.view(-1, HIDDEN).clone(), self.memory
            for start, end, entry in (span for span in spans if span[2] >= 0):
                if self.kind == "grace":
                    new[end - 1] = memory.values[entry]
                elif self.kind == "memoir":
                    columns = memory.columns[entry]
                    new[start:end] += rows[start:end, columns] @ memory.weight[:, columns].T
                else:
                    new[start:end] += rows[start:end] @ memory.changes[entry].T
            return new.view_as(output)

        with self.editor.unedited() as lm, changed_output(lm.layout.mlp_out(LAYER), change):
            return lm.states(**lm.pad([ids]).inputs())[0]

    def held(self, prompt: Ids, text: Sequence[int] = ()) -> Tensor:
        """The states of a prompt and a text, with what the prompt decides."""
        end = len(prompt) + (0 if self.kind == "grace" else len(text))
        return self.states((*prompt, *text), [(0, end, self.entry(prompt))])

    def written(self, prompt: Ids, count: int, beams: int = 1, never: Sequence[int] = ()) -> list[int]:
        """The text that a search with some beams finds, greedily with one: a whole forward for each step of each."""
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(count):
            more = []
            for total, text in best:
                logs = self.lm.logits(self.held(prompt, text)[-1]).log_softmax(-1)
                logs[list(never)] = -torch.inf
                more += [(total + logs[token].item(), [*text, token]) for token in logs.topk(beams).indices.tolist()]
            best = sorted(more, reverse=True)[:beams]
        return best[0][1]


@contextmanager
def attached(kind: str, family: str, corpus: Path, **more: Any) -> Iterator[Attached]:
    settings = {**SETTINGS.get(kind, {}), "layer": LAYER, **more}
    editor = make_editor(shared(family), corpus, kind, method_settings=settings)
    try:
        yield Attached(editor, kind)
    finally:
        editor.reset()


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_rows_of_a_padded_batch_decide_and_read_as_alone(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        held, entries = DynamicCache(), [it.entry(row) for row in it.prompts]
        found = it.lm.states(**it.lm.pad(it.prompts).inputs(), past_key_values=held, use_cache=True)
        assert decisions_of(held)[kind].tolist() == Prefill.of(it.lm, it.prompts).decisions[kind].tolist() == entries
        assert len({*entries, -1}) == len(set(entries)) >= 3
        for row, states, entry in zip(it.prompts, found, entries, strict=True):
            expected = it.held(row)
            close(states[: len(row)], expected)
            close(it.lm.states(**it.lm.pad([row]).inputs())[0], expected)
            assert bool((expected - it.states(row, []))[-1].norm() > 0.5) == (entry >= 0)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_texts_behind_prompts_in_any_order_keep_the_prompts_decision(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        numbers = [3, 0, 5, 0, 2, 1, 4]
        texts = [it.texts[(number + at) % 6] for at, number in enumerate(numbers)]
        found = Prefill.of(it.lm, it.prompts).states_behind(torch.tensor(numbers), texts)
        for number, text, states in zip(numbers, texts, found, strict=True):
            close(states[: len(text)], it.held(it.prompts[number], text)[len(it.prompts[number]) :])


def test_prompts_whose_beginning_runs_once_decide_as_whole_prompts(corpus_path: Path) -> None:
    with attached("grace", "llama", corpus_path) as it:
        begin = len(it.lm.encode("The home town of").ids)
        assert len({row[:begin] for row in it.prompts}) == 1
        found = Prefill.of(it.lm, it.prompts, shared=begin).decisions["grace"]
        assert found.tolist() == [it.entry(row) for row in it.prompts]


@pytest.mark.parametrize("family", DECODERS)
def test_prompts_whose_beginning_runs_once_are_read_as_whole_texts(family: str) -> None:
    """Prompts of several lengths behind a beginning that is longer than the window of local attention, or shorter."""
    lm, behind = shared(family), list(shared(family).encode("x", "Buenos Aires").target_ids)
    for begin in ("In short:", "The book was long. Mira Lanner lives in the city of Cairo. We had tea at noon, and so"):
        asked = ["Corin Vane lives in the city of", "he is", "the home town of Wendel van Huxtable is"]
        rows = [lm.encode(f"{begin} {text}").ids for text in asked]
        found = Prefill.of(lm, rows, shared=len(lm.encode(begin).ids))
        states = found.states_behind(torch.tensor([2, 0, 1]), [behind, behind[:1], behind])
        assert max(map(len, rows)) - min(map(len, rows)) > 3
        for number, row in enumerate(rows):
            expected = whole_states(lm, [*row, *behind])[len(row) - 1 :]
            torch.testing.assert_close(found.last[number], expected[0], rtol=1e-3, atol=1e-4)
            at, length = [2, 0, 1].index(number), 1 if number == 0 else len(behind)
            torch.testing.assert_close(states[at, :length], expected[1 : 1 + length], rtol=1e-3, atol=1e-4)


def test_a_token_that_straddles_the_end_of_a_shared_beginning_is_read_as_a_whole() -> None:
    lm, begin = fresh("llama"), "The home town is New De"
    pairs = [(f"{begin}{rest}", "Oslo") for rest in ("lhi and", "ar and", "lhi or so")]
    rows = [lm.encode(prompt).ids for prompt, _ in pairs]
    assert len({row[: len(lm.encode(begin).ids)] for row in rows}) > 1
    expected = read(lm, pairs)
    lm.redirect = lambda prompts, room: [Speaker(lm, prompt, begin) for prompt in prompts]
    for found, alone in zip(read(lm, pairs), expected, strict=True):
        assert found.nll == pytest.approx(alone.nll, abs=1e-4)


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_what_is_written_behind_prompts_keeps_the_prompts_decision(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        numbers, room = torch.tensor([4, 0, 2, 0, 3, 1]), torch.tensor([2, 5, 3, 1, 5, 4])
        texts = [it.written(it.prompts[number], count) for number, count in zip(numbers, room, strict=True)]
        prefill, stops = Prefill.of(it.lm, it.prompts), torch.zeros(6, it.lm.model.config.vocab_size).bool()
        drafts = [[[9, 9]], [texts[1]], [texts[2][:2]], [], [[*texts[4][:2], 9, 9]], []]
        for guesses in ([], drafts):
            assert prefill.continuations(numbers, room, stops, guesses) == texts
        stops[:, texts[1][0]] = True
        cut = [row[: row.index(texts[1][0]) + 1] if texts[1][0] in row else row for row in texts]
        assert prefill.continuations(numbers, room, stops, drafts) == cut != texts


# opt fails: its language model calls the decoder, not the base model whose calls are watched (AssertionError).
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_generation_of_a_batch_keeps_each_prompts_decision(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        found, end = [it.written(row, 4) for row in it.prompts], it.lm.tokenizer.eos_token_id
        expected = [row[: row.index(end) + 1] if end in row else row for row in found]
        assert it.lm.generate_ids(it.prompts, max_new_tokens=4) == expected
        assert it.lm.generate_ids(it.prompts[2:3], max_new_tokens=4) == expected[2:3]
        with it.editor.unedited() as lm:
            assert lm.generate_ids(it.prompts, max_new_tokens=4) != expected


# opt fails, as above.
@pytest.mark.parametrize("family", DECODERS)
def test_a_call_of_the_whole_model_is_watched_like_one_of_its_base(family: str) -> None:
    lm, mask = shared(family), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with watching(lm) as watcher:
        lm.model(input_ids=mask + 5, attention_mask=mask, use_cache=False)
        assert torch.equal(watcher.now.real, mask.bool())


@pytest.mark.parametrize(("kind", "family"), CASES[:3])
def test_beams_keep_the_decision_of_their_prompt(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        batch, end = it.lm.pad(it.prompts, side="left"), it.lm.tokenizer.eos_token_id
        config = GenerationConfig(num_beams=2, eos_token_id=end, pad_token_id=0, max_new_tokens=4, min_new_tokens=4)
        out = it.lm.model.generate(input_ids=batch.ids, attention_mask=batch.mask, generation_config=config)
        expected = [it.written(row, 4, beams=2, never=[end]) for row in it.prompts]
        assert out[:, batch.ids.shape[1] :].tolist() == expected != [it.written(row, 4) for row in it.prompts]


def test_decisions_follow_the_rows_of_their_cache() -> None:
    cache, rows = DynamicCache(), torch.arange(3)
    cache.update(rows.view(3, 1, 1, 1), rows.view(3, 1, 1, 1), 0)
    for who in ("a", "b"):
        keep_decisions(cache, {who: rows})
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 1, 2, 2, 0, 4]))
    cache.batch_select_indices(torch.tensor([4, 0, 2]))
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(torch.tensor([2, 0]))
    for each, expected in ((copied, [1, 0]), (cache, [0, 2, 1])):
        kept = [each.layers[0].keys, *decisions_of(each).values()]
        assert [part.flatten().tolist() for part in kept] == [expected] * 3


def test_a_cache_that_the_model_makes_itself_keeps_the_decision(corpus_path: Path) -> None:
    with attached("memoir", "llama", corpus_path) as it:
        prompt, text = it.prompts[0], it.texts[0]
        first = it.lm.model(torch.tensor([prompt]), use_cache=True)
        second = it.lm.model(torch.tensor([text]), past_key_values=first.past_key_values)
        close(second.logits[0], it.lm.logits(it.held(prompt, text)[len(prompt) :]))


@pytest.mark.parametrize(("kind", "family"), [("grace", "opt"), ("wise", "gpt2")])
def test_routing_by_call_asks_each_call_anew(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path, routing="call") as it:
        behind = Prefill.of(it.lm, it.prompts).states_behind(torch.arange(6), it.texts)
        asked = [(prompt + text, len(prompt)) for prompt, text in zip(it.prompts, it.texts, strict=True)]
        for (whole, end), found in zip(asked, behind, strict=True):
            spans = [(0, end, it.entry(whole[:end])), (end, len(whole), it.entry(whole, end))]
            close(found[: len(whole) - end], it.states(whole, spans)[end:])
        assert [it.entry(*whole) for whole in asked] != [it.entry(prompt) for prompt in it.prompts]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_call_without_a_cache_decides_from_the_whole_text(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        wholes = [prompt + text for prompt, text in zip(it.prompts, it.texts, strict=True)]
        for whole in wholes:
            close(it.lm.states(**it.lm.pad([whole]).inputs())[0], it.held(whole))
        assert list(map(it.entry, wholes)) != list(map(it.entry, it.prompts))


@pytest.mark.parametrize(("kind", "family"), CASES[:3])
def test_a_stream_goes_to_disk_and_back_to_the_bit(kind: str, family: str, corpus_path: Path, tmp_path: Path) -> None:
    def outputs(editor: Editor) -> Tensor:
        return editor.lm.model(**editor.lm.pad(tokens(editor.lm)[0]).inputs()).logits

    settings = {**METHOD_SETTINGS[kind], "steps": 3} | ({"shard_edits": 2} if kind == "wise" else {})
    editor, other = (make_editor(family, corpus_path, kind, method_settings=settings) for _ in range(2))
    base, before, moved = outputs(editor), bits(editor.lm), []
    for count, person in enumerate((7, 24, 4), start=1):
        editor.edit(home_town(person), score=False)
        RunFolder(tmp_path).save_state(editor.state(), count)
        other.load_state(RunFolder(tmp_path).load_state(other.lm.device)[0])
        now = outputs(editor)
        assert torch.equal(now, outputs(other))
        with editor.trial(home_town(0), score=False):
            moved.append(not torch.equal(outputs(editor), now))
        assert torch.equal(outputs(editor), now)
    assert any(moved)
    for one in (editor, other):
        one.edit(home_town(17), score=False)
    assert torch.equal(outputs(editor), outputs(other))
    editor.reset()
    assert torch.equal(outputs(editor), base)
    assert same_bits(editor.lm, before)
    assert hooks_left(editor.lm) == []


@pytest.mark.parametrize(("kind", "family"), [("grace", "llama"), ("memoir", "gpt2"), ("wise", "gpt2")])
def test_scores_know_the_memory_and_the_baseline_does_not(kind: str, family: str, corpus_path: Path) -> None:
    editor, first = make_editor(family, corpus_path, kind), home_town(0)
    result = editor.edit(first)
    assert [part[0].scores[TOKENS]["reliability"] for part in (result.before, result.after)] == [0.0, 1.0]
    probe = Probe(prompt=first.prompt, answer=first.target_new)
    result = editor.edit(home_town(10, locality=(probe,)))
    assert result.before[0].scores[TOKENS]["locality"] == 0.0
    answer = editor.ask(first.prompt, max_new_tokens=3)
    assert answer.base == shared(family).generate([first.prompt], max_new_tokens=3)[0] != answer.edited
