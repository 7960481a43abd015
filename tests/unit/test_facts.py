"""The store of facts in the prompt: against a plain list, and as fast with a hundred thousand facts as with a few."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import everedit
from everedit.edit import Edit
from everedit.engine.facts import Facts, newest
from everedit.engine.state import State
from everedit.methods.ike import Demonstrations, IkeConfig, InContext
from everedit.models.sentences import SentenceEncoder
from tests.support.loading import shared

WIDTH = 5
PROMPTS = [
    "The capital of Kenya",
    "the  CAPITAL of kenya",
    "Wo liegt Köln?",
    "東京はどこ",
    "Naïve café 🙂",
    "a",
    "A  b",
    "a b",
]
TARGETS = ["Nairobi", "Österreich", "日本", "x", "🙂🙂", "two words"]


def embedding(number: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))


def plus(facts: Facts, edits: list[Edit], numbers: list[int]) -> Facts:
    """The facts with the newest of some edits, each of which has the embedding of its number."""
    kept = newest(edits)
    rows = [numbers[len(edits) - 1 - edits[::-1].index(edit)] for edit in kept]
    return facts.plus(kept, torch.stack([embedding(row) for row in rows]))


def test_facts_are_kept_as_a_plain_list_keeps_them_and_the_newest_behind_a_prompt_stands() -> None:
    order = random.Random(4)
    facts, by_hand = Facts.none(WIDTH, torch.device("cpu")), []
    for batch in range(40):
        edits = [
            Edit(prompt=order.choice(PROMPTS), target_new=order.choice(TARGETS)) for _ in range(order.randint(1, 5))
        ]
        numbers = [100 * batch + place for place in range(len(edits))]
        facts = plus(facts, edits, numbers)
        for edit, number in zip(edits, numbers, strict=True):
            key = edit.prompt.casefold().split()
            by_hand = [item for item in by_hand if item[0].casefold().split() != key]
            by_hand.append((edit.prompt, edit.target_new, number))
        # What is stored in one batch stands in the order of the edits that stay.
        assert [facts[index] for index in range(len(facts))] == [item[:2] for item in by_hand]
        assert torch.equal(facts.embeddings, torch.stack([embedding(number) for *_, number in by_hand]))
        again = Facts.of(State(facts.tensors()))
        assert again is not None
        assert [again[index] for index in range(len(again))] == [facts[index] for index in range(len(facts))]
    assert len(facts) == 6


def test_there_are_no_facts_before_the_first_and_after_the_last() -> None:
    none = Facts.none(WIDTH, torch.device("cpu"))
    assert Facts.of(State()) is None
    assert Facts.of(State(none.tensors())) is None
    assert Facts.of(State(plus(none, [Edit(prompt="a", target_new="b")], [0]).tensors())) is not None


def test_the_nearest_fact_is_that_of_the_largest_product() -> None:
    facts = Facts.none(WIDTH, torch.device("cpu"))
    facts = plus(facts, [Edit(prompt=f"p {n}", target_new="t") for n in range(30)], list(range(30)))
    queries = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(1))
    values, numbers = facts.nearest(queries)
    for query, value, number in zip(queries.tolist(), values.tolist(), numbers.tolist(), strict=True):
        products = [sum(a * b for a, b in zip(query, row, strict=True)) for row in facts.embeddings.tolist()]
        assert number == products.index(max(products))
        assert value == pytest.approx(max(products), rel=1e-5)
    assert len(set(numbers.tolist())) > 5


def many(count: int, width: int) -> State:
    """A state of ``count`` facts with texts of one length, made without going through edits."""
    texts = "".join(f"The number of thing {n:07d}is {n:07d}" for n in range(count)).encode()
    lengths = torch.tensor([27, 10]).repeat(count)
    random_ = torch.Generator().manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(count, width, generator=random_), dim=1)
    text = torch.frombuffer(bytearray(texts), dtype=torch.uint8)
    return State(Facts(text, lengths.cumsum(0), embeddings, torch.arange(count)).tensors())


def instructions(work: Callable[[], Any]) -> tuple[int, Any]:
    """How many instructions of Everedit's own Python run, and what comes of it."""
    root, count = str(Path(everedit.__file__).parent), [0]

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        count[0] += event == "opcode"
        return inside

    def begin(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(root):
            return None
        frame.f_trace_opcodes = True
        return inside

    before = sys.gettrace()
    sys.settrace(begin)
    try:
        found = work()
    finally:
        sys.settrace(before)
    return count[0], found


def test_a_hundred_thousand_facts_take_no_more_python_than_a_hundred() -> None:
    lm, encoder = shared("llama"), SentenceEncoder()
    edits = [Edit(prompt=prompt, target_new="Cairo") for prompt in ("The capital of Kenya is", "Water freezes into")]
    embedded = encoder.embed([edit.prompt for edit in edits])
    counts = {}
    for count in (100, 100_000):
        state = many(count, encoder.width)
        # One of the new facts takes the place of a stored one.
        numbers = state.tensors["facts.prompts"]
        numbers[count // 2] = plus(Facts.none(WIDTH, lm.device), edits[:1], [0]).prompts[0]

        def work(state: State = state) -> tuple[Facts, list[str]]:
            facts = Facts.of(state)
            assert facts is not None
            facts = facts.plus(edits, embedded)
            memory = InContext(facts, encoder, Demonstrations([], embedded[:0]), IkeConfig(k=0, self_copy=False), 0)
            asked = ["The capital of Kenya is", "What is the capital of Kenya?", "Bees make"]
            return facts, [speaker.prompt for speaker in memory.speakers(lm, asked, [5] * 3)]

        counts[count], (facts, said) = instructions(work)
        assert len(facts) == count + 1
        assert facts[count - 2] == (f"The number of thing {count - 1:07d}", f"is {count - 1:07d}")
        assert said[0] == "New Fact: The capital of Kenya is Cairo\nPrompt: The capital of Kenya is"
        assert said[1:] == [
            "New Fact: The capital of Kenya is Cairo\nPrompt: What is the capital of Kenya?",
            "Bees make",
        ]
    assert counts[100] == counts[100_000] > 500
