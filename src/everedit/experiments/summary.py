"""From rows to the summary: each protocol at each checkpoint, immediately, retained and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everedit.data.contradictions import contradicted_by
from everedit.edit import Edit
from everedit.evaluation import PROTOCOLS, EditScores
from everedit.evaluation.aggregate import intervals
from everedit.evaluation.evaluate import average

__all__ = ["by_edit", "checkpoint_scores", "summarise"]

Scores = dict[str, dict[str, float | None]]

_FIRST = 100
_OF_A_CHECKPOINT = ("retained", "uncontradicted", "first_100")


def by_edit(scores: Sequence[EditScores]) -> dict[str, dict[str, list[float | None]]]:
    """Return every edit's score, in order, by protocol and metric: what intervals and paired tests are made of."""
    return {
        name: {metric: [item.scores[name][metric] for item in scores] for metric in metrics}
        for name, metrics in (scores[0].scores if scores else {}).items()
    }


def checkpoint_scores(
    edits: Sequence[Edit], scores: Sequence[EditScores], seed: int, *, single: bool = False
) -> dict[str, Any]:
    """Return what a checkpoint says of ``edits``, all that were made so far, from their scores on the present model.

    ``retained`` are means over all of them, with bootstrap ``intervals``; ``uncontradicted`` over those that no later
    one contradicts, in whatever words, since no editor can keep both; ``first_100`` over the first 100. ``single``
    edits, which do not stand together, contradict nothing.
    """
    later = contradicted_by(edits) if not single else [None] * len(edits)
    kept = [item for item, index in zip(scores, later, strict=True) if index is None]
    return {
        "retained": average(scores),
        "intervals": {name: _intervals(scores, name, seed) for name in (scores[0].scores if scores else {})},
        "uncontradicted": average(kept),
        "contradicted": len(scores) - len(kept),
        "first_100": average(scores[:_FIRST]),
        "by_edit": by_edit(scores),
    }


def _intervals(scores: Sequence[EditScores], name: str, seed: int) -> dict[str, list[float] | None]:
    protocol = PROTOCOLS[name]
    found = intervals([item.scores[name] for item in scores], protocol.metrics, protocol.aggregates, seed=seed)
    # As it comes back from a file.
    return {metric: None if pair is None else list(pair) for metric, pair in found.items()}


def summarise(
    rows: Sequence[dict[str, Any]], final: Sequence[Scores], before: Sequence[Scores], quarantined: int, peak_mb: float
) -> dict[str, Any]:
    """Return the summary of a run.

    ``rows`` are those of ``metrics.jsonl``; ``final`` and ``before`` the scores of every edit with the last and with
    the unedited model. At a checkpoint T, ``immediate`` is the mean over edits 1..T of the score right after each
    edit, all None where that was not asked, ``retained`` the mean over the same edits with the model after T edits,
    ``final`` with the last model; what else a checkpoint says is as in :func:`checkpoint_scores`.
    """
    edits = [row for row in rows if row["kind"] == "edit"]
    marks = [row for row in rows if row["kind"] == "checkpoint"]
    immediate = [row["immediate"] for row in edits]
    protocols: dict[str, Any] = {}
    for name in final[0]:
        protocols[name] = {
            "unedited": _summary(before, name),
            "checkpoints": {
                str(mark["n"]): {
                    "immediate": _summary([scores for scores in immediate[: mark["n"]] if name in scores], name),
                    **{part: mark[part][name] for part in _OF_A_CHECKPOINT},
                    "final": _summary(final[: mark["n"]], name),
                }
                for mark in marks
            },
            "intervals": {str(mark["n"]): mark["intervals"][name] for mark in marks},
        }
    phases = list(dict.fromkeys(phase for row in edits for phase in row["seconds"]))
    spent = {phase: sum(row["seconds"].get(phase, 0.0) for row in edits) / len(edits) for phase in phases}
    return {
        "protocols": protocols,
        "edits": len(edits),
        "contradicted": {str(mark["n"]): mark["contradicted"] for mark in marks},
        "quarantined": quarantined,
        "seconds_per_edit": {**spent, "total": sum(spent.values())},
        "peak_memory_mb": peak_mb,
        "memory_mb": {str(row["n"]): row["memory_mb"] for row in edits if row["n"] in (1, 10) or row is edits[-1]},
    }


def _summary(scores: Sequence[Scores], protocol: str) -> dict[str, float | None]:
    return PROTOCOLS[protocol].summary([item[protocol] for item in scores])
