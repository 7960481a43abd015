"""What a memory beside the weights costs while the model writes: tokens a second with it, against the plain model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.table import Row
from everedit.editor import Editor
from everedit.engine.beside import Memory
from everedit.engine.margin import Book
from everedit.engine.router import Address
from everedit.engine.state import State
from everedit.models import LanguageModel
from everedit.models.sentences import PACKAGED, SentenceEncoder

EDITS = (1, 100, 1000)
# The share of the plain model's speed that must be left.
BARS = {"wise": 0.90, "grace": 0.85, "memoir": 0.85, "t-patcher": 0.85}
NEURONS_AN_EDIT = 3
# Marginalia's, where no note applies and where one applies to every prompt.
ROUTED_BARS = {"no prompt names a subject": 0.95, "every prompt goes to a note": 0.90}
NEW_TOKENS, PAIRS = 32, 5
PROMPTS = ["The river that flows through the old town is", "She opened the letter and", "Water boils when"]


def overheads(lm: LanguageModel) -> Iterator[Row]:
    """Every memory with 1, 100 and 1,000 edits, all of them filled so that they answer every prompt."""
    for method, bar in BARS.items():
        editor = Editor(lm, method)
        for edits in EDITS:
            memory = editor.method.memory(editor.bench, full_state(editor, edits))
            yield _compared(lm, memory, method, f"{edits} edits", "every prompt answered by the memory", bar)
    yield from _routed(lm)


def _routed(lm: LanguageModel) -> Iterator[Row]:
    """Marginalia's book, whose router reads every prompt before the first token."""
    editor = Editor(lm, "marginalia")
    random = torch.Generator().manual_seed(0)
    encoder = SentenceEncoder(PACKAGED)
    # A note without a subject is about its whole sentence.
    for said, routed in (("no prompt names a subject", []), ("every prompt goes to a note", PROMPTS)):
        for edits in EDITS:
            names = [f"Quillon Varga-{number}" for number in range(max(0, edits - len(routed)))]
            addresses = [Address((name,), f"{name} was born in") for name in names]
            addresses += [Address((), prompt) for prompt in routed]
            vectors = 1e-6 * torch.randn(len(addresses), lm.layout.hidden_size, generator=random)
            keys = encoder.embed([address.key() for address in addresses])
            memory = editor.method.memory(editor.bench, Book.written(vectors, keys, addresses).state())
            yield _compared(lm, memory, "marginalia", f"{len(addresses)} edits", said, ROUTED_BARS[said])


def _compared(lm: LanguageModel, memory: Memory | None, method: str, edits: str, said: str, bar: float) -> Row:
    """Generation with a memory beside the model, in turns with the plain model, since a machine's speed drifts."""
    assert memory is not None
    written(lm)
    pairs = []
    for _ in range(PAIRS):
        plain = written(lm)
        with memory.attached(lm):
            pairs.append((plain, written(lm)))
    plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = statistics.median(with_it / without for without, with_it in pairs)
    note = f"{edits}; {len(PROMPTS)} prompts, {NEW_TOKENS} tokens each, {said}"
    return Row(f"generation with {method}", plain, ours, "tokens/s", share, bar, note)


def written(lm: LanguageModel) -> float:
    """Tokens a second of a greedy continuation."""
    rows = [lm.encode(prompt).ids for prompt in PROMPTS]
    start = time.perf_counter()
    lm.generate_ids(rows, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    return len(rows) * NEW_TOKENS / (time.perf_counter() - start)


def full_state(editor: Editor, edits: int) -> State:
    """A state such as ``edits`` edits leave, of random values too small to matter."""
    layout, config = editor.lm.layout, editor.method.config
    random = torch.Generator().manual_seed(0)
    wide, high = layout.inner_size, layout.hidden_size

    def drawn(*shape: int) -> torch.Tensor:
        return 1e-6 * torch.randn(*shape, generator=random)

    made: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        "wise": (
            {
                "filling": drawn(high, wide),
                "mask": torch.ones(high, wide, dtype=torch.bool),
                "full": torch.zeros(0, high, wide),
                "full_thresholds": torch.zeros(0),
                "done": drawn(max(1, edits // 500), high, wide)[: edits // 500],
                "done_thresholds": torch.full((edits // 500,), -1.0),
            },
            {"edits": edits, "threshold": -1.0},
        ),
        "grace": (
            {
                "keys": drawn(edits, wide),
                "values": drawn(edits, high),
                "radii": torch.full((edits,), 1e9),
                "labels": torch.zeros(edits, 3, dtype=torch.long),
            },
            {},
        ),
        "memoir": (
            {
                "weight": drawn(high, wide),
                "columns": torch.stack(
                    [torch.randperm(wide, generator=random)[: getattr(config, "k", 1)] for _ in range(edits)]
                ).int(),
                "places": torch.arange(wide),
                "background": torch.zeros(wide),
            },
            {},
        ),
        "t-patcher": (
            {
                "keys": drawn(NEURONS_AN_EDIT * edits, high),
                "values": drawn(NEURONS_AN_EDIT * edits, high),
                "biases": torch.zeros(NEURONS_AN_EDIT * edits),
            },
            {},
        ),
    }
    if editor.method.name == "memoir":
        editor.method.config = config.model_copy(update={"threshold": 0.0})
    return State(*made[editor.method.name])
