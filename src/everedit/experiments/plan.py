"""What a run will do and about what it will cost, before it is done."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from everedit.data import data_set, load_edits
from everedit.editor import Editor
from everedit.evaluation import FOR_ANY_DATA, Evaluator
from everedit.experiments.config import RunConfig
from everedit.experiments.scoring import make_evaluator
from everedit.models import LanguageModel

__all__ = ["Plan", "make_plan", "tokens_a_second"]

_SAMPLE_EDITS = 16
_PROBE_TOKENS = 128
# A step is a forward and a backward of about equal cost; not every edit needs all of its steps.
_PASSES_A_STEP, _SHARE_OF_STEPS = 2.0, 0.7
_RUNTIME_BYTES = 650 * 2**20


@dataclass(frozen=True)
class Plan:
    """A run's plan. Times and memory are estimates from one timed forward pass of this model on this machine."""

    model: dict[str, Any]
    method: str
    policy: str
    edits: int
    set_aside: int
    layers: list[int]
    statistics_missing: list[int]
    statistics_tokens: int
    checkpoints: list[int]
    protocols: list[str]
    seconds_statistics: float
    seconds_per_edit: float
    seconds_total: float
    memory_mb: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def make_plan(config: RunConfig, editor: Editor, rate: float | None = None) -> Plan:
    """Return the plan of a run without running it; one short forward pass is timed unless ``rate`` is known."""
    lm, method = editor.lm, editor.method
    loaded = load_edits(config.data, config.data_path, keep_contradictions=config.contradictions == "keep")
    data_set(loaded.name).require_protocols(loaded.name, config.protocols, FOR_ANY_DATA)
    edits = loaded.edits[: config.edits]
    rate = tokens_a_second(lm) if rate is None else rate
    layers = list(method.layers())
    missing = editor.bench.moments.missing(method.moment_layers())
    share = (max(missing) + 1) / lm.layout.n_layers if missing else 0.0
    # Text sampled from the model is written token by token, which costs about as much again as reading it.
    statistics = (
        config.stats.tokens * (share + (4.0 if config.stats.corpus is None else 0.0)) / rate if missing else 0.0
    )
    per_edit = _seconds_per_edit(editor, edits[:_SAMPLE_EDITS], rate)
    checkpoints = sum(mark for mark in config.checkpoints if mark <= len(edits))
    scoring = _probe_tokens(make_evaluator(lm, config), edits[:_SAMPLE_EDITS]) / rate
    return Plan(
        model=lm.layout.describe() | {"name": config.model, "device": str(lm.device), "parameters": lm.parameters},
        method=method.name,
        policy=editor.policy.name,
        edits=len(edits),
        set_aside=len(loaded.rejected),
        layers=layers,
        statistics_missing=missing,
        statistics_tokens=config.stats.tokens if missing else 0,
        checkpoints=list(config.checkpoints),
        protocols=list(config.protocols),
        seconds_statistics=round(statistics, 1),
        seconds_per_edit=round(per_edit + scoring, 2),
        seconds_total=round(statistics + (per_edit + scoring) * len(edits) + scoring * (checkpoints + len(edits)), 1),
        memory_mb=round(_memory_bytes(lm, layers, editor.policy.reads_keys) / 2**20),
    )


@torch.no_grad()
def tokens_a_second(lm: LanguageModel) -> float:
    """Return how many tokens a second the model reads here, from one short forward pass."""
    ids = torch.zeros(4, _PROBE_TOKENS // 4, dtype=torch.long, device=lm.device)
    lm.states(input_ids=ids)
    start = time.perf_counter()
    lm.states(input_ids=ids).sum().item()
    return _PROBE_TOKENS / (time.perf_counter() - start)


def _seconds_per_edit(editor: Editor, edits: list[Any], rate: float) -> float:
    """Tokens that an edit runs, at the measured rate."""
    if not edits:
        return 0.0
    config, encode = editor.method.config, editor.lm.encode
    target = getattr(config, "target", None)
    if target is None:
        whole = sum(len(encode(edit.prompt, edit.target_new).ids) for edit in edits) / len(edits)
        return editor.method.work(whole) / rate
    lm, rows = editor.lm, 1 + sum(count for _, count in getattr(config, "contexts", None) or ())
    layers = editor.method.layers()
    tried = layers if editor.method.traits.chooses_layer else layers[-1:]
    above = sum(1 - (layer + 1) / lm.layout.n_layers for layer in tried)
    tails, fulls = [], []
    for edit in edits:
        text = lm.encode(edit.prompt, edit.target_new, subject=edit.subject)
        tails.append(len(text.ids) - text.subject_last)
        fulls.append(len(text.ids) + 10)
    tail, full = sum(tails) / len(tails), sum(fulls) / len(fulls)
    steps = target.steps * _SHARE_OF_STEPS * _PASSES_A_STEP
    return (rows * tail * above * steps + rows * full * 2 * len(tried)) / rate


def _probe_tokens(evaluator: Evaluator, edits: list[Any]) -> float:
    """Tokens that scoring one edit runs; generation writes about as many again as it reads."""
    sizes = [
        sum(len(evaluator.lm.encode(prompt, answer).ids) for prompt, answer in evaluator.probes(edit)) for edit in edits
    ]
    return 2.0 * sum(sizes) / max(1, len(sizes))


def _memory_bytes(lm: LanguageModel, layers: list[int], reads_keys: bool) -> float:
    weights = sum(math.prod(p.shape) * p.element_size() for p in lm.model.parameters())
    inner, hidden = lm.layout.inner_size, lm.layout.hidden_size
    # For each layer: original and float32 master, second moment with its factor, and the policy's square matrix.
    squares = 2 + int(reads_keys)
    return weights + len(layers) * (8 * hidden * inner + squares * 8 * inner**2) + _RUNTIME_BYTES
