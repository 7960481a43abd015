"""Numbers of the report: scores per protocol, running means and seconds, computed from run files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from everedit.report.run_files import Record, RunFiles

METRICS = ("reliability", "generalization", "locality", "portability")

PHASES = ("keys", "target", "solve", "policy", "score")

Scores = dict[str, float | None]


@dataclass(frozen=True)
class ProtocolResult:
    """Scores under one protocol; a score is None where there was no such probe.

    ``immediate_at`` and ``retained_at`` map a checkpoint's number of edits to its scores;
    ``running`` maps a metric to (edit number, mean of that metric over the edits so far).
    ``measured`` maps a checkpoint to the number of edits whose reliability was measured by then,
    ``uncontradicted_at`` to how many edits a later one contradicts, if any, and the scores without these.
    ``single`` edits were each taken back before the next: there is nothing to retain.
    """

    name: str
    unedited: Scores
    immediate_at: dict[int, Scores]
    retained_at: dict[int, Scores]
    running: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    measured: dict[int, int] = field(default_factory=dict)
    uncontradicted_at: dict[int, tuple[int, Scores]] = field(default_factory=dict)
    single: bool = False

    @property
    def metrics(self) -> list[str]:
        """The names of the scores: the four usual ones, or a protocol's own."""
        blocks = [self.unedited, *self.retained_at.values(), *self.immediate_at.values()]
        found = dict.fromkeys(name for block in blocks for name in block)
        return list(found) or list(METRICS)

    @property
    def last_checkpoint(self) -> int | None:
        """The largest checkpoint with retained scores, or None before the first one."""
        return max(self.retained_at, default=None)


def number(value: object) -> float | None:
    """Return ``value`` as a finite float, or None if it is anything else (null, NaN, text)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: object) -> dict[str, Any]:
    """Return ``value`` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are there, or None if there are none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def protocol_results(run: RunFiles) -> list[ProtocolResult]:
    """Return one result per protocol, in the order of the configuration.

    The summary's numbers are used where it has them. What it lacks (all of it, in an interrupted run)
    is computed from the edit and checkpoint records.
    """
    return [_protocol_result(run, name) for name in _protocol_names(run)]


def seconds_by_phase(edits: list[Record]) -> tuple[list[int], dict[str, list[float]]]:
    """Return the edit numbers and, per phase, the seconds of each of these edits (0 where absent)."""
    timed = [edit for edit in edits if mapping(edit.get("seconds"))]
    found = {phase for edit in timed for phase in edit["seconds"] if phase != "total"}
    phases = [phase for phase in PHASES if phase in found] + sorted(found.difference(PHASES))
    seconds = {phase: [number(edit["seconds"].get(phase)) or 0.0 for edit in timed] for phase in phases}
    return [edit["n"] for edit in timed], seconds


def mean_seconds(run: RunFiles) -> dict[str, float]:
    """Return the mean seconds per edit of each phase, from the summary or else from the records."""
    stored = mapping(mapping(run.summary).get("seconds_per_edit"))
    if stored:
        known = {phase: number(value) for phase, value in stored.items() if phase != "total"}
        return {phase: value for phase, value in known.items() if value is not None}
    numbers, seconds = seconds_by_phase(run.edits)
    return {phase: sum(values) / len(numbers) for phase, values in seconds.items()}


def norm_ratios(checkpoints: list[Record]) -> dict[str, list[tuple[int, float]]]:
    """Return, per edited matrix, (checkpoint, norm relative to the unedited matrix)."""
    ratios: dict[str, list[tuple[int, float]]] = {}
    for checkpoint in checkpoints:
        for name, value in mapping(checkpoint.get("norm_ratio")).items():
            ratio = number(value)
            if ratio is not None:
                ratios.setdefault(name, []).append((checkpoint["n"], ratio))
    return ratios


def peak_memory_mb(run: RunFiles) -> float | None:
    """Return the largest memory use on record in megabytes, or None if none was recorded."""
    stored = number(mapping(run.summary).get("peak_memory_mb"))
    if stored is not None:
        return stored
    found = [number(checkpoint.get("peak_memory_mb")) for checkpoint in run.checkpoints]
    return max((value for value in found if value is not None), default=None)


def _protocol_names(run: RunFiles) -> list[str]:
    listed = run.config.get("protocols")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    names += mapping(mapping(run.summary).get("protocols"))
    for edit in run.edits:
        names += mapping(edit.get("immediate"))
    for checkpoint in run.checkpoints:
        names += mapping(checkpoint.get("retained"))
    return list(dict.fromkeys(names))


def _protocol_result(run: RunFiles, name: str) -> ProtocolResult:
    stored = mapping(mapping(mapping(run.summary).get("protocols")).get(name))
    immediate: dict[int, Scores] = {}
    retained: dict[int, Scores] = {}
    for checkpoint in run.checkpoints:
        n = checkpoint["n"]
        if name in mapping(checkpoint.get("retained")):
            retained[n] = _scores(checkpoint["retained"][name])
            immediate[n] = _mean_scores([edit for edit in run.edits if edit["n"] <= n], "immediate", name)
    for key, block in mapping(stored.get("checkpoints")).items():
        if not key.isdecimal():
            continue
        for into, part in ((immediate, "immediate"), (retained, "retained")):
            if mapping(mapping(block).get(part)):
                into[int(key)] = _scores(block[part])
    if not immediate and run.edits:
        # Interrupted before the first checkpoint: the edits made so far can still be described.
        immediate[run.edits[-1]["n"]] = _mean_scores(run.edits, "immediate", name)
    contradicted = {
        checkpoint["n"]: (int(count), _scores(mapping(checkpoint.get("uncontradicted")).get(name)))
        for checkpoint in run.checkpoints
        if (count := number(checkpoint.get("contradicted")))
    }
    unedited = mapping(stored.get("unedited"))
    return ProtocolResult(
        name=name,
        unedited=_scores(unedited) if unedited else _mean_scores(run.edits, "before", name),
        immediate_at=dict(sorted(immediate.items())),
        retained_at=dict(sorted(retained.items())),
        running={metric: _running_mean(run.edits, name, metric) for metric in METRICS},
        measured={n: _measured_edits(run.edits, name, n) for n in retained},
        uncontradicted_at=contradicted,
        single=bool(mapping(run.config.get("run")).get("single")),
    )


def _scores(block: object) -> Scores:
    return {metric: number(value) for metric, value in mapping(block).items()}


def _score(edit: Record, part: str, name: str, metric: str) -> float | None:
    return number(mapping(mapping(edit.get(part)).get(name)).get(metric))


def _mean_scores(edits: list[Record], part: str, name: str) -> Scores:
    metrics = dict.fromkeys(m for edit in edits for m in mapping(mapping(edit.get(part)).get(name)))
    return {metric: mean(_score(edit, part, name, metric) for edit in edits) for metric in metrics}


def _measured_edits(edits: list[Record], name: str, n: int) -> int:
    return sum(1 for e in edits if e["n"] <= n and _score(e, "before", name, "reliability") is not None)


def _running_mean(edits: list[Record], name: str, metric: str) -> list[tuple[int, float]]:
    points: list[tuple[int, float]] = []
    total = 0.0
    for edit in edits:
        value = _score(edit, "immediate", name, metric)
        if value is not None:
            total += value
            points.append((edit["n"], total / (len(points) + 1)))
    return points
