"""From rows to the summary: each protocol at each checkpoint, immediately, retained and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everedit.evaluation import EditScores
from everedit.evaluation.metrics import mean
from everedit.evaluation.protocols import METRICS

__all__ = ["by_edit", "summarise"]

Scores = dict[str, dict[str, float | None]]


def by_edit(scores: Sequence[EditScores]) -> dict[str, dict[str, list[float | None]]]:
    """Return every edit's score, in order, by protocol and metric: what intervals and paired tests are made of."""
    return {
        name: {metric: [item.scores[name][metric] for item in scores] for metric in metrics}
        for name, metrics in (scores[0].scores if scores else {}).items()
    }


def summarise(
    rows: Sequence[dict[str, Any]], final: Sequence[Scores], before: Sequence[Scores], quarantined: int, peak_mb: float
) -> dict[str, Any]:
    """Return the summary of a run.

    ``rows`` are those of ``metrics.jsonl``; ``final`` and ``before`` the scores of every edit with the last and with
    the unedited model. At a checkpoint T, ``immediate`` is the mean over edits 1..T of the score right after each
    edit, ``retained`` the mean over the same edits with the model after T edits, ``final`` with the last model.
    """
    edits = [row for row in rows if row["kind"] == "edit"]
    marks = [row for row in rows if row["kind"] == "checkpoint"]
    immediate = [row["immediate"] for row in edits]
    protocols: dict[str, Any] = {}
    for name in final[0]:
        protocols[name] = {
            "unedited": _mean(before, name),
            "checkpoints": {
                str(mark["n"]): {
                    "immediate": _mean(immediate[: mark["n"]], name),
                    "retained": mark["retained"][name],
                    "final": _mean(final[: mark["n"]], name),
                }
                for mark in marks
            },
        }
    phases = list(dict.fromkeys(phase for row in edits for phase in row["seconds"]))
    spent = {phase: sum(row["seconds"].get(phase, 0.0) for row in edits) / len(edits) for phase in phases}
    return {
        "protocols": protocols,
        "edits": len(edits),
        "quarantined": quarantined,
        "seconds_per_edit": {**spent, "total": sum(spent.values())},
        "peak_memory_mb": peak_mb,
        "memory_mb": {str(row["n"]): row["memory_mb"] for row in edits if row["n"] in (1, 10) or row is edits[-1]},
    }


def _mean(scores: Sequence[Scores], protocol: str) -> dict[str, float | None]:
    return {metric: mean(item[protocol][metric] for item in scores) for metric in METRICS}
