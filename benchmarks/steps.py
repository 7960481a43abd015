"""What a step of the gradient methods costs against a bare forward and backward pass of the same texts, and how the
solves of the batch methods grow with the batch and with the stream.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch.nn import functional as F

from benchmarks.table import Row
from everedit.data import load_edits
from everedit.editor import Editor
from everedit.engine.moments import SecondMoment
from everedit.engine.solve import Factor
from everedit.engine.state import Growing, State
from everedit.methods import method_class
from everedit.models import LanguageModel

PAIRS, EDITS = 5, 10
BATCHES = (1, 4, 16, 64, 256)
EARLY, STREAM = 10, 1000


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def gradient_steps(lm: LanguageModel) -> Iterator[Row]:
    """UltraEdit's turn and FT-M's step, against a forward and a backward pass through the whole model."""
    edits = load_edits("worldfacts").edits[:EDITS]
    texts = [lm.encode(edit.prompt, edit.target_new) for edit in edits]
    batch = lm.pad([text.ids[:-1] for text in texts])
    places = [(row, at - 1) for row, text in enumerate(texts) for at in range(*text.target)]
    rows, columns = (torch.tensor(part) for part in zip(*places, strict=True))
    labels = torch.tensor([token for text in texts for token in text.target_ids])

    def bare() -> None:
        entering = lm.model.get_input_embeddings()(batch.ids).detach().requires_grad_()
        states = lm.states(inputs_embeds=entering, attention_mask=batch.mask, position_ids=batch.positions)
        torch.autograd.grad(F.cross_entropy(lm.logits(states[rows, columns]), labels), entering)

    ultra = Editor(lm, "ultraedit")
    steps = 5
    tuned = Editor(lm, "ft-m", method_settings={"steps": steps, "stop_loss": 0.0})
    work: dict[str, tuple[Callable[[], Any], int]] = {
        "UltraEdit, a turn of 10": (lambda: ultra.method.fit(ultra.bench, edits, State()), 1),
        "FT-M, a step on 10 edits": (lambda: tuned.method.fit(tuned.bench, edits, State()), steps),
    }
    for name, (run, count) in work.items():
        bare(), run()
        pairs = [(seconds(bare), seconds(run) / count) for _ in range(PAIRS)]
        plain, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        yield Row(name, plain, ours, "s", ratio, 1 / 1.3, "plain: forward and backward of the same texts")


def solves(lm: LanguageModel, folder: Path) -> Iterator[Row]:
    """Seconds a layer against the batch's size and against the length of the stream, for one-by-one and batch edits."""
    random = torch.Generator().manual_seed(0)
    moment = _moment(lm.layout.inner_size, random)
    bench: Any = SimpleNamespace(moments=SimpleNamespace(get=lambda layers: {0: moment}))
    methods = {name: _method(lm, name) for name in ("memit", "alphaedit", "rlsedit")}

    def problem(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, residual = ((width, n) for width in (lm.layout.inner_size, lm.layout.hidden_size))
        return torch.randn(keys, generator=random), torch.randn(residual, generator=random)

    problems = [problem(n) for n in BATCHES]
    by_batch = {name: [_solve_time(method, bench, *pair) for pair in problems] for name, method in methods.items()}
    by_batch["plain"] = [seconds(partial(_plain, moment, *pair)) for pair in problems]
    found = {name: _stream_times(method, bench, problem) for name, method in methods.items()}
    _figure(by_batch, {name: times for name, (times, _) in found.items()}, folder)
    at = BATCHES.index(16)
    for name, (_, pairs) in found.items():
        early, late = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        what = f"{name}: solve at edit {EARLY}, at edit {STREAM}"
        yield Row(what, early, late, "s", ratio, 1 / 1.1, "100 pairs in turns, on both states")
        plain, ours = by_batch["plain"][at], by_batch[name][at]
        yield Row(f"{name}: solve of 16 edits", plain, ours, "s", plain / ours, 1.0, "plain: a D x D solve each batch")


def _moment(wide: int, random: torch.Generator) -> SecondMoment:
    """Second moments of keys whose directions carry from 1 % to all of the weight, with their factors made."""
    keys = torch.randn(4 * wide, wide, generator=random, dtype=torch.float64) * torch.linspace(0.1, 1, wide).double()
    moment = SecondMoment(0, keys.T @ keys / len(keys), len(keys))
    _ = moment.factor, moment.eigen
    return moment


def _solve_time(method: Any, bench: Any, keys: torch.Tensor, residual: torch.Tensor) -> float:
    state = Growing()
    method.solve(bench, 0, keys, residual, state)
    return statistics.median(
        seconds(lambda: method.solve(bench, 0, keys, residual, Growing(state))) for _ in range(PAIRS)
    )


def _stream_times(
    method: Any, bench: Any, problem: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[list[float], list[tuple[float, float]]]:
    """Seconds of each step of a stream, and pairs of seconds of one more step early and late in it.

    The pairs are taken in turns: over a thousand steps the machine's own speed drifts.
    """
    state = Growing()
    early = Growing()
    times = []
    for step in range(1, STREAM + 1):
        times.append(seconds(partial(method.solve, bench, 0, *problem(1), state)))
        if step == EARLY:
            early = Growing(state)
    one = problem(1)
    solve = partial(method.solve, bench, 0, *one)
    return times, [(seconds(lambda: solve(Growing(early))), seconds(lambda: solve(Growing(state)))) for _ in range(100)]


def _method(lm: LanguageModel, name: str) -> Any:
    kind = method_class(name)
    settings = {"threshold": 0.5} if name == "alphaedit" else {}
    return kind(kind.Config(**settings).resolved(lm.layout))


def _plain(moment: SecondMoment, keys: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    wide = keys.double()
    return residual.double() @ Factor.of(50.0 * moment.matrix + wide @ wide.T).solve(wide).T


def _figure(by_batch: dict[str, list[float]], by_time: dict[str, list[float]], folder: Path) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    figure.patch.set_facecolor("white")
    left, right = figure.subplots(1, 2)
    for name, values in by_batch.items():
        left.plot(BATCHES, values, marker="o", label=name, color="grey" if name == "plain" else None)
    left.set(xscale="log", yscale="log", xlabel="edits in a batch", ylabel="seconds a layer")
    left.legend(frameon=False, fontsize=8)
    for name, values in by_time.items():
        window = [statistics.median(values[max(0, at - 20) : at + 21]) for at in range(len(values))]
        right.plot(range(1, len(values) + 1), window, label=name)
    right.set(xlabel="edits made before", ylabel="seconds a layer", ylim=(0, None))
    folder.mkdir(parents=True, exist_ok=True)
    FigureCanvasSVG(figure).print_svg(str(folder / "solves.svg"), metadata={"Date": None})
