"""Run folders with numbers chosen by hand: what tables, curves and comparisons are checked against."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

PROTOCOL = "teacher-forced/token-accuracy@1"


def fake_run(
    folder: Path,
    immediate: Sequence[float],
    retained: dict[int, Sequence[float]],
    *,
    method: str = "memit",
    policy: str = "accumulate",
    seed: int = 0,
    locality: float = 1.0,
    protocol: str = PROTOCOL,
    first_id: int = 0,
    finished: bool = True,
    growth: dict[int, float] | None = None,
    ability: dict[int, float] | None = None,
    beneath: float | None = None,
    **settings: Any,
) -> Path:
    """Write a run folder of as many edits as there are ``immediate`` reliabilities.

    ``retained`` maps T to the reliability of each of the first T edits then, without whose first one the rest is
    uncontradicted. Locality is the same everywhere; ``ability`` maps T to the accuracy in a task, 0 meaning before any;
    ``beneath`` is every reliability of the stream beneath the policy, which is plain accumulation.
    Every edit took 2 s, and 3 s of scoring; the process held 100 MiB more at each checkpoint.
    """
    folder.mkdir(parents=True)
    run = {"model": "tiny", "data": "towns", "method": method, "policy": policy, "seed": seed, **settings}
    described = {"run": run, "method": method, "policy": policy, "edits": len(immediate), "protocols": [protocol]}
    if beneath is not None:
        run["beneath"], described["beneath"] = True, {"policy": "accumulate", "policy_settings": {}}
    (folder / "config.json").write_text(json.dumps(described))

    def scores(value: float, kept: float = locality) -> dict[str, Any]:
        return {protocol: {"reliability": value, "locality": kept, "portability": None}}

    def measured(value: float) -> dict[str, Any]:
        return {"nli@1": {"figures": {"accuracy": value}, "intervals": {"accuracy": [value - 0.1, value + 0.1]}}}

    if ability:
        (folder / "ability.json").write_text(json.dumps(measured(ability[0])))
    rows: list[dict[str, Any]] = []
    for n, value in enumerate(immediate, start=1):
        edit = {
            "kind": "edit",
            "n": n,
            "edit_id": f"e{first_id + n}",
            "seconds": {"target": 1.5, "solve": 0.5, "score": 3.0},
        }
        under = {} if beneath is None else {"beneath": {"immediate": scores(beneath), "retained": scores(beneath)}}
        rows.append({**edit, "before": scores(0.0, 1.0), "immediate": scores(value), **under})
        if n in retained:
            values = list(retained[n])
            by_edit = {"reliability": values, "locality": [locality] * n, "portability": [None] * n}
            rows.append(
                {
                    "kind": "checkpoint",
                    "n": n,
                    "retained": scores(mean(values)),
                    "uncontradicted": scores(mean(values[1:] or values)),
                    "first_100": scores(mean(values[:100])),
                    "contradicted": 1,
                    **under,
                    "by_edit": {protocol: by_edit},
                    **({"ability": measured(ability[n])} if ability else {}),
                    "norm_ratio": {"a": 1.0, "b": (growth or {}).get(n, 1.5)},
                    "singular_value_ratio": {"a": 2.0, "b": 1.0},
                    "peak_memory_mb": 900.0 + 100 * len([row for row in rows if row["kind"] == "checkpoint"]),
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "summary.json").write_text(json.dumps({"protocols": {}, "edits": len(immediate)}))
    return folder


def fake_sweep(folder: Path, cells: dict[str, dict[str, Any]], title: str = "A sweep") -> Path:
    """Write a sweep's manifest over cells (name: axes, skipped) whose folders are made elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = [{"name": name, "config": {}, "skipped": "", **cell} for name, cell in cells.items()]
    manifest = {
        "title": title,
        "kind": "run",
        "cells": listed,
        "source": "methods: [memit]\n",
        "command": "everedit sweep",
    }
    (folder / "sweep.json").write_text(json.dumps(manifest))
    return folder
