"""The engine's fast paths against the plain ones, each pair in one process on the same work."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional as F

from benchmarks.table import Row
from everedit.data import load_edits
from everedit.editor import Editor
from everedit.engine.moments import Corpus, MomentStore, accumulate
from everedit.engine.target import TargetConfig, optimise_targets
from everedit.evaluation import Evaluator
from everedit.evaluation.metrics import token_accuracy
from everedit.evaluation.read import read
from everedit.models import LanguageModel
from tests.oracles import plain_target

T = TypeVar("T")
STEPS, BATCH, PAIRS = 25, 16, 3


def timed(work: Callable[..., T], *given, **named) -> tuple[T, float]:
    start = time.perf_counter()
    result = work(*given, **named)
    return result, time.perf_counter() - start


def seconds(work: Callable[[], object]) -> float:
    return timed(work)[1]


def value_optimisation(lm: LanguageModel) -> Iterator[Row]:
    """The value loop: the same rows and steps, plain full forwards against the engine, alone and in a batch."""
    edits = load_edits("worldfacts").edits[:BATCH]
    for method, site, bars in (("memit", "block", (3.0, 6.0)), ("rome", "mlp", (3.0, 4.0))):
        editor = Editor(lm, method)
        layer = editor.method.layers()[-1]
        # No early stop: both sides make every step.
        config = TargetConfig(steps=STEPS, lr=0.1, stop_loss=0.0)
        prefixes = editor.bench.contexts(((10, 5),), ("The", "Therefore", "Because", "I", "You"))
        work = {"layer": layer, "config": config, "site": site}
        optimise_targets(lm, edits[:1], prefixes, **work)
        times: dict[str, list[float]] = {"plain": [], "alone": [], "batch": []}
        apart = []
        # In turns, since a machine's speed drifts within minutes.
        for index, edit in enumerate(edits[:PAIRS]):
            wanted, took = timed(plain_target, lm, edit, prefixes, **work)
            times["plain"].append(took)
            found, took = timed(optimise_targets, lm, [edit], prefixes, **work)
            times["alone"].append(took)
            together, took = timed(optimise_targets, lm, edits, prefixes, **work)
            times["batch"].append(took / BATCH)
            aims = [found[0].delta, together[index].delta]
            apart += [float((aim - wanted.delta).norm() / wanted.delta.norm()) for aim in aims]
        base, one, batch = (statistics.median(column) for column in times.values())
        note = f"{method}, {len(prefixes) + 1} rows, layer {layer}, {STEPS} steps; largest difference {max(apart):.1e}"
        yield Row("value optimisation, one edit", base, one, "s/edit", base / one, bars[0], note)
        yield Row(f"value optimisation, batch of {BATCH}", base, batch, "s/edit", base / batch, bars[1], note)
        if max(apart) > 1e-4:
            raise SystemExit(f"{method}: the target vectors differ by {max(apart):.1e}, more than 1e-4")


def second_moments(lm: LanguageModel, text: Path) -> Iterator[Row]:
    """Tokens a second of the statistics of three layers, against a bare forward of the blocks below the deepest."""
    layers = [14, 15, 16]
    windows = [row for _, row in zip(range(16), Corpus(text, 1 << 20).windows(lm), strict=False)]
    tokens = sum(map(len, windows))

    def bare() -> None:
        # The blocks below the deepest key, that block's attention and MLP input: all that a key needs.
        modules = {layers[-1]: lm.layout.mlp_out(layers[-1])}
        for start in range(0, len(windows), 8):
            lm.inputs_of(modules, lm.pad(windows[start : start + 8]))

    bare()
    pairs = [(seconds(bare), seconds(lambda: accumulate(lm, layers, iter(windows)))) for _ in range(PAIRS)]
    plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    share = statistics.median(bare_time / our_time for bare_time, our_time in pairs)
    note = f"layers {layers}, {tokens} tokens in windows of {len(windows[0])}; bare forward against with statistics"
    yield Row("second moments, 3 layers in one pass", tokens / plain, tokens / ours, "tokens/s", share, 0.7, note)
    root = Path(tempfile.mkdtemp())
    try:
        corpus = Corpus(text, 4096)
        first = seconds(lambda: MomentStore(lm, corpus, root).get(layers))
        again = seconds(lambda: MomentStore(lm, corpus, root).get(layers))
    finally:
        shutil.rmtree(root)
    yield Row("second moments, found in the cache", first, again, "s", 1.0 / again, 1.0, "bar: under a second")


def evaluation(lm: LanguageModel) -> Iterator[Row]:
    """Teacher-forced scores of every probe, one prompt at a time with full logits against batches."""
    edits = load_edits("worldfacts").edits[:24]
    probes = list(dict.fromkeys(pair for edit in edits for pair in Evaluator(lm).probes(edit)))

    @torch.no_grad()
    def one_at_a_time() -> list[tuple[float, float]]:
        found = []
        for prompt, target in probes:
            text = lm.encode(prompt, target)
            logits = lm.model(input_ids=torch.tensor([text.ids], device=lm.device)).logits[0].float()
            at = logits[text.prompt_end - 1 : len(text.ids) - 1]
            labels = torch.tensor(text.target_ids, device=lm.device)
            found.append((float((at.argmax(-1) == labels).float().mean()), float(F.cross_entropy(at, labels))))
        return found

    def batched() -> list[tuple[float, float]]:
        return [(token_accuracy(r.predicted, r.target), r.nll) for r in read(lm, probes)]

    slow, fast = one_at_a_time(), batched()
    if any(abs(a[0] - b[0]) > 1e-6 or abs(a[1] - b[1]) > 1e-3 for a, b in zip(slow, fast, strict=True)):
        raise SystemExit("batched evaluation scores differently")
    pairs = [(seconds(one_at_a_time), seconds(batched)) for _ in range(PAIRS)]
    plain, ours = (statistics.median(column) / len(probes) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    yield Row("evaluation", plain, ours, "s/probe", ratio, 4.0, f"{len(probes)} probes, equal scores")
