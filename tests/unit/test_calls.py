"""What a memory decides for a prompt holds until its sequence ends, wherever the rows go, and leaves with the memory.

Made-up memories are compared with whole, unpadded texts that run without a cache and are changed by a plain hook.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
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
from everedit.experiments.folder import RunFolder
from everedit.methods.grace import CodeBook
from everedit.methods.memoir import ResidualMemory, TopHash
from everedit.models import LanguageModel
from everedit.models.calls import decisions_of, keep_decisions, watching
from everedit.models.hooks import changed_output
from everedit.models.layout import oriented
from everedit.models.prefill import Prefill
from tests.support.editing import METHOD_SETTINGS, home_town, make_editor
from tests.support.loading import DECODERS, bits, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

CASES = [("grace", "llama"), ("memoir", "gemma3_text"), ("wise", "gpt2"), ("grace", "opt"), ("wise", "llama")]
LAYER, HIDDEN, WIDTH, K = 1, 64, 256, 60
# Of different lengths; the first three are in the memories.
PROMPTS = {7: "Lisbon", 24: "New Delhi", 4: "Oslo and Lima", 17: "fire fighter", 1: "Buenos Aires piano", 0: "baker"}
SETTINGS: dict[str, Any] = {"memoir": {"threshold": 0.9, "k": K}, "wise": {"memories": "retrieve", "ratio": 1}}
TOKENS = "teacher-forced/token-accuracy@1"
Ids = tuple[int, ...]


def tokens(lm: LanguageModel) -> tuple[list[Ids], list[Ids]]:
    """The prompts, and a text for each to stand behind it."""
    both = [lm.encode(home_town(person).prompt, text) for person, text in PROMPTS.items()]
    return [row.ids[: row.prompt_end] for row in both], [row.target_ids for row in both]


def through_layer(lm: LanguageModel, ids: Ids) -> tuple[Tensor, Tensor]:
    """What enters the layer's down projection and what comes out of it, (tokens, …), where no memory stands."""
    module = lm.layout.mlp_out(LAYER)
    keys = lm.inputs_of({"key": module}, lm.pad([ids]))["key"].view(-1, WIDTH)
    return keys, F.linear(keys, oriented(module), module.bias)


def made_up(kind: str, lm: LanguageModel) -> State:
    """A state whose memory answers some of the prompts, in different ways."""
    random, (prompts, texts) = torch.Generator().manual_seed(1), tokens(lm)
    layers = [through_layer(lm, ids) for ids in prompts]
    if kind == "grace":
        # The end of the fourth prompt's text is a key too: whoever asks again there gets another answer.
        ends = [*layers[:3], through_layer(lm, prompts[3] + texts[3])]
        keys, values = torch.stack([keys[-1] for keys, _ in ends]), 4 * torch.randn(4, HIDDEN, generator=random)
        return State({"keys": keys, "values": values, "radii": torch.full((4,), 1e-2), "labels": torch.zeros(4, 1)})
    if kind == "memoir":
        places, zeros = torch.randperm(WIDTH, generator=random), torch.zeros(WIDTH)
        hasher, weight = TopHash(zeros, places, K, "mean"), torch.randn(HIDDEN, WIDTH, generator=random)
        columns = [hasher.columns(keys[None], torch.ones(1, len(keys), dtype=torch.bool)) for keys, _ in layers[:3]]
        return State({"weight": weight, "columns": torch.cat(columns), "places": places, "background": zeros})
    done, act = torch.randn(2, HIDDEN, WIDTH, generator=random) * torch.tensor([[[0.5]], [[0.6]]]), lm.layout.activation
    moved = [[(act(out + keys @ w.T) - act(out)).norm(dim=-1).mean().item() for w in done] for keys, out in layers]
    ranked = torch.tensor(moved).sort(0).values
    # One memory answers some prompts; the other, which moves all of them more, one.
    limits = torch.stack([ranked[2:4, 0].mean(), ranked[4:, 1].mean()])
    tensors = {"filling": torch.zeros_like(done[0]), "mask": torch.zeros_like(done[0]) > 0, "full": done[:0]}
    tensors |= {"full_thresholds": limits[:0], "done": done, "done_thresholds": limits}
    return State(tensors, {"edits": 9, "threshold": float("inf"), "memories": 2})


@dataclass
class Attached:
    """An editor with a made-up memory, and what its texts should be."""

    editor: Editor
    memory: Any

    def __post_init__(self) -> None:
        self.lm, self.entry = self.editor.lm, cache(self.decided)
        self.prompts, self.texts = tokens(self.lm)

    def decided(self, ids: Ids, start: int = 0) -> int:
        """What is decided on the tokens from ``start`` on."""
        keys, values = (part[None, start:] for part in through_layer(self.lm, ids))
        if isinstance(self.memory, CodeBook):
            return int(self.memory.chosen(keys[:, -1]))
        more = () if isinstance(self.memory, ResidualMemory) else (values,)
        return int(self.memory.chosen(keys, *more, torch.ones(keys.shape[:2], dtype=torch.bool)))

    def states(self, ids: Ids, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """The states (tokens, H) with an entry in force from start to end of each of some spans."""

        def change(key: Tensor, output: Tensor) -> Tensor:
            rows, new, memory = key.view(-1, WIDTH), output.view(-1, HIDDEN).clone(), self.memory
            for start, end, entry in (span for span in spans if span[2] >= 0):
                if isinstance(memory, CodeBook):
                    new[end - 1] = memory.values[entry]
                elif isinstance(memory, ResidualMemory):
                    columns = memory.columns[entry]
                    new[start:end] += rows[start:end, columns] @ memory.weight[:, columns].T
                else:
                    new[start:end] += rows[start:end] @ memory.changes[entry].T
            return new.view_as(output)

        with self.editor.unedited() as lm, changed_output(lm.layout.mlp_out(LAYER), change):
            return lm.states(**lm.pad([ids]).inputs())[0]

    def held(self, prompt: Ids, text: Sequence[int] = ()) -> Tensor:
        """The states of a prompt and a text, with what the prompt decides."""
        end = len(prompt) + (0 if isinstance(self.memory, CodeBook) else len(text))
        return self.states((*prompt, *text), [(0, end, self.entry(prompt))])

    def greedy(self, prompt: Ids, count: int) -> list[int]:
        text: list[int] = []
        for _ in range(count):
            text.append(int(self.lm.logits(self.held(prompt, text)[-1]).argmax()))
        return text


@contextmanager
def attached(kind: str, family: str, corpus: Path, **more: Any) -> Iterator[Attached]:
    settings, state = {**SETTINGS.get(kind, {}), "layer": LAYER, **more}, made_up(kind, shared(family))
    editor = make_editor(shared(family), corpus, kind, method_settings=settings)
    editor.load_state(StreamState(Snapshot({}), state, State(), {}))
    try:
        yield Attached(editor, editor.method.memory(editor.bench, state))
    finally:
        editor.reset()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


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
        numbers, prefill = [3, 0, 5, 0, 2, 1, 4], Prefill.of(it.lm, it.prompts)
        texts = [it.texts[(number + at) % 6] for at, number in enumerate(numbers)]
        found = prefill.states_behind(torch.tensor(numbers), texts)
        for number, text, states in zip(numbers, texts, found, strict=True):
            close(states[: len(text)], it.held(it.prompts[number], text)[len(it.prompts[number]) :])


def test_prompts_whose_beginning_runs_once_decide_as_whole_prompts(corpus_path: Path) -> None:
    # Fails: the decision is made on the shared beginning, which is the first call of the sequence.
    with attached("grace", "llama", corpus_path) as it:
        begin = len(it.lm.encode("The home town of").ids)
        assert len({row[:begin] for row in it.prompts}) == 1
        found = Prefill.of(it.lm, it.prompts, shared=begin).decisions["grace"]
        assert found.tolist() == [it.entry(row) for row in it.prompts]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_what_is_written_behind_prompts_keeps_the_prompts_decision(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        numbers, room = torch.tensor([4, 0, 2, 0, 3, 1]), torch.tensor([2, 5, 3, 1, 5, 4])
        texts = [it.greedy(it.prompts[number], count) for number, count in zip(numbers, room, strict=True)]
        prefill, stops = Prefill.of(it.lm, it.prompts), torch.zeros(6, it.lm.model.config.vocab_size).bool()
        drafts = [[[9, 9]], [texts[1]], [texts[2][:2]], [], [[*texts[4][:2], 9, 9]], []]
        for guesses in ([], drafts):
            assert prefill.continuations(numbers, room, stops, guesses) == texts
        # A row that has ended leaves the cache.
        stops[:, texts[1][0]] = True
        cut = [row[: row.index(texts[1][0]) + 1] if texts[1][0] in row else row for row in texts]
        assert prefill.continuations(numbers, room, stops, drafts) == cut != texts


# opt fails: its language model calls the decoder, not the base model whose calls are watched (AssertionError).
@pytest.mark.parametrize(("kind", "family"), CASES)
def test_generation_of_a_batch_keeps_each_prompts_decision(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        end = it.lm.tokenizer.eos_token_id
        expected = [it.greedy(row, 4) for row in it.prompts]
        expected = [row[: row.index(end) + 1] if end in row else row for row in expected]
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


def beams_by_hand(it: Attached, prompt: Ids) -> list[int]:
    """The better of two beams, each of whose four tokens is weighed by a whole forward."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(4):
        more = []
        for total, text in beams:
            logs = it.lm.logits(it.held(prompt, text)[-1]).log_softmax(-1)
            logs[it.lm.tokenizer.eos_token_id] = -torch.inf
            more += [(total + float(logs[token]), [*text, token]) for token in logs.topk(2).indices.tolist()]
        beams = sorted(more, reverse=True)[:2]
    return beams[0][1]


@pytest.mark.parametrize(("kind", "family"), CASES[:3])
def test_beams_keep_the_decision_of_their_prompt(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        batch, four = it.lm.pad(it.prompts, side="left"), {"max_new_tokens": 4, "min_new_tokens": 4}
        config = GenerationConfig(num_beams=2, eos_token_id=it.lm.tokenizer.eos_token_id, pad_token_id=0, **four)
        out = it.lm.model.generate(input_ids=batch.ids, attention_mask=batch.mask, generation_config=config)
        found = out[:, batch.ids.shape[1] :].tolist()
        assert found == [beams_by_hand(it, row) for row in it.prompts] != [it.greedy(row, 4) for row in it.prompts]


def kept_cache(rows: int) -> DynamicCache:
    cache, numbers = DynamicCache(), torch.arange(rows)
    cache.update(numbers.view(rows, 1, 1, 1), numbers.view(rows, 1, 1, 1), 0)
    for who in ("a", "b"):
        keep_decisions(cache, {who: numbers})
    return cache


def rows_of(cache: DynamicCache) -> list[list[int]]:
    return [part.flatten().tolist() for part in (cache.layers[0].keys, *decisions_of(cache).values())]


def test_decisions_follow_the_rows_of_their_cache() -> None:
    cache = kept_cache(3)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 1, 2, 2, 0, 4]))
    assert rows_of(cache) == [[2, 0, 1, 1, 0, 2]] * 3
    cache.batch_select_indices(torch.tensor([4, 0, 0]))
    assert rows_of(cache) == [[0, 2, 2]] * 3


def test_the_rows_of_a_copied_cache_are_its_own() -> None:
    # Fails: what is done to the rows of the copy is done to those of the cache that it was copied from.
    cache = kept_cache(3)
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(torch.tensor([2, 0]))
    assert (rows_of(cache), rows_of(copied)) == ([[0, 1, 2]] * 3, [[2, 0]] * 3)


def test_a_cache_that_the_model_makes_itself_keeps_the_decision(corpus_path: Path) -> None:
    # Fails: nothing is kept on a cache that was not there when the call began; the next call decides anew.
    with attached("memoir", "llama", corpus_path) as it:
        prompt, text = it.prompts[0], it.texts[0]
        first = it.lm.model(torch.tensor([prompt]), use_cache=True)
        close(first.logits[0], it.lm.logits(it.held(prompt)))
        second = it.lm.model(torch.tensor([text]), past_key_values=first.past_key_values)
        close(second.logits[0], it.lm.logits(it.held(prompt, text)[len(prompt) :]))


@pytest.mark.parametrize(("kind", "family"), [("grace", "opt"), ("wise", "gpt2")])
def test_routing_by_call_asks_each_call_anew(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path, routing="call") as it:
        behind = Prefill.of(it.lm, it.prompts).states_behind(torch.arange(6), it.texts)
        for prompt, text, found in zip(it.prompts, it.texts, behind, strict=True):
            whole, end = prompt + text, len(prompt)
            spans = [(0, end, it.entry(prompt)), (end, len(whole), it.entry(whole, end))]
            close(found[: len(text)], it.states(whole, spans)[end:])
        # At the fourth text's end another entry answers than at its prompt's.
        assert (behind[3, len(it.texts[3]) - 1] - it.held(it.prompts[3], it.texts[3])[-1]).norm() > 0.1


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_call_without_a_cache_decides_from_the_whole_text(kind: str, family: str, corpus_path: Path) -> None:
    with attached(kind, family, corpus_path) as it:
        wholes = [prompt + text for prompt, text in zip(it.prompts, it.texts, strict=True)]
        for whole in wholes:
            close(it.lm.states(**it.lm.pad([whole]).inputs())[0], it.held(whole))
        assert list(map(it.entry, wholes)) != list(map(it.entry, it.prompts))


def logits(lm: LanguageModel) -> Tensor:
    return lm.logits(lm.states(**lm.pad(tokens(lm)[0]).inputs()))


@pytest.mark.parametrize(("kind", "family"), CASES[:3])
def test_a_stream_goes_to_disk_and_back_to_the_bit(kind: str, family: str, corpus_path: Path, tmp_path: Path) -> None:
    settings = {**METHOD_SETTINGS[kind], "steps": 3} | ({"shard_edits": 2} if kind == "wise" else {})
    editor, other = (make_editor(family, corpus_path, kind, method_settings=settings) for _ in range(2))
    base, before, moved = logits(editor.lm), bits(editor.lm), []
    for count, person in enumerate((7, 24, 4), start=1):
        editor.edit(home_town(person), score=False)
        RunFolder(tmp_path).save_state(editor.state(), count)
        other.load_state(RunFolder(tmp_path).load_state(other.lm.device)[0])
        now = logits(editor.lm)
        assert torch.equal(now, logits(other.lm))
        assert not torch.equal(now, base)
        with editor.trial(home_town(0), score=False):
            moved.append(not torch.equal(logits(editor.lm), now))
        assert torch.equal(logits(editor.lm), now)
    assert any(moved)
    # Both go on alike, and the trials left nothing behind.
    for one in (editor, other):
        one.edit(home_town(17), score=False)
    assert torch.equal(logits(editor.lm), logits(other.lm))
    editor.reset()
    assert torch.equal(logits(editor.lm), base)
    assert same_bits(editor.lm, before)
    assert hooks_left(editor.lm) == []


@pytest.mark.parametrize(("kind", "family"), [("grace", "llama"), ("memoir", "gpt2"), ("wise", "gpt2")])
def test_scores_know_the_memory_and_the_baseline_does_not(kind: str, family: str, corpus_path: Path) -> None:
    editor, first = make_editor(family, corpus_path, kind), home_town(0)
    result = editor.edit(first)
    assert [part[0].scores[TOKENS]["reliability"] for part in (result.before, result.after)] == [0.0, 1.0]
    # This probe asks for what the first edit has changed.
    probe = Probe(prompt=first.prompt, answer=first.target_new)
    result = editor.edit(home_town(10, locality=(probe,)))
    assert result.before[0].scores[TOKENS]["locality"] == 0.0
    answer = editor.ask(first.prompt, max_new_tokens=3)
    assert answer.base == shared(family).generate([first.prompt], max_new_tokens=3)[0] != answer.edited
