"""What a note of Marginalia costs, in batches: by strides against Adam, and against the half second promised."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.table import Row
from everedit.data import load_edits
from everedit.editor import Editor
from everedit.engine.state import State
from everedit.models import LanguageModel

BATCH, PAIRS = 32, 3
ADAM = {"target": {"descent": "adam", "lr": 1.5}}
ROUNDED = {"target": {"products": "bfloat16"}}


def notes(lm: LanguageModel) -> Iterator[Row]:
    """Seconds a note, from the wordings to the vector, and bytes of it on disk."""
    edits = load_edits("worldfacts").edits[:BATCH]
    plain, ours, rounded = _editor(lm, ADAM), _editor(lm, {}), _editor(lm, ROUNDED)

    def a_note(editor: Editor) -> float:
        start = time.perf_counter()
        editor.method.fit(editor.bench, edits, State())
        return (time.perf_counter() - start) / BATCH

    turns = [(a_note(plain), a_note(ours), a_note(rounded)) for _ in range(PAIRS)]
    adam, strides, narrow = (statistics.median(column) for column in zip(*turns, strict=True))
    ratio = statistics.median(one / other for one, other, _ in turns)
    yield Row(f"Marginalia, a note in a batch of {BATCH}", adam, strides, "s", ratio, 1.2, "plain: by Adam")
    yield Row("the same, against what is promised", 0.5, strides, "s", 0.5 / strides, 1.0, "on two cores")
    gain = statistics.median(one / other for _, one, other in turns)
    # Nothing is promised of a processor: few have units for it.
    yield Row("the same, with products of bfloat16", strides, narrow, "s", gain, 0.0, "plain: float32")
    _, state = ours.method.fit(ours.bench, edits, State())
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values()) / BATCH
    yield Row("a note on disk, against what is promised", 5120, held, "bytes", 5120 / held, 1.0, "vector and address")


def _editor(lm: LanguageModel, settings: dict[str, Any]) -> Editor:
    editor = Editor(lm, "marginalia", method_settings=settings)
    editor.prepare()
    return editor
