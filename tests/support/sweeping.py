"""Small sweeps over tiny models, and a worker that makes cells in this very process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from everedit.experiments.sweeps import CellState, Manifest, SweepConfig, SweepFolder, cells_of, drive
from everedit.experiments.sweeps.work import Job, work
from tests.support import tiny
from tests.support.editing import METHOD_SETTINGS

METHODS = ("ft", "memit")


def sweep_values(data: Path, corpus: Path, **changes: Any) -> dict[str, Any]:
    """Return a sweep of two methods on a tiny GPT-2, under settings that suit it."""
    values: dict[str, Any] = {
        "run": {
            "edits": 4,
            "checkpoints": [2],
            "device": "cpu",
            "protocols": ["teacher-forced/token-accuracy@1"],
            "stats": {"corpus": str(corpus), "tokens": 4096, "window_tokens": 64},
        },
        "models": [{"name": str(tiny.trained("gpt2")), "label": "tiny"}],
        "data": [{"name": str(data), "label": "towns"}],
        "methods": [{"name": name, "set": {"method_settings": plain(METHOD_SETTINGS[name])}} for name in METHODS],
    }
    return {**values, **changes}


def plain(value: Any) -> Any:
    """Return a value as YAML knows it: tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(held) for key, held in value.items()}
    return [plain(held) for held in value] if isinstance(value, list | tuple) else value


def write_sweep(path: Path, values: dict[str, Any]) -> Path:
    """Write a sweep's file."""
    path.write_text(yaml.safe_dump(plain(values), sort_keys=False), encoding="utf-8")
    return path


def new_sweep(path: Path, values: dict[str, Any]) -> SweepFolder:
    """Return a new sweep's folder."""
    config = SweepConfig.parse(plain(values), "sweep.yaml")
    cells = tuple(cells_of(config, "sweep.yaml"))
    manifest = Manifest("A test", config.kind, cells, threads=1, untouched=config.untouched, cwd=str(Path.cwd()))
    return SweepFolder.create(path, manifest)


class Here:
    """Workers that make a job at once, in this process: the plain form of what processes and clusters do."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self._over: list[Job] = []

    def free(self) -> bool:
        return not self._over

    def give(self, job: Job) -> None:
        work(job.as_dict())
        self.made.append(job.name)
        self._over.append(job)

    def ended(self, seconds: float) -> list[Job]:
        over, self._over = self._over, []
        return over

    def close(self) -> None:
        pass


def quietly(states: Any) -> None:
    """Watch and say nothing."""


def made_here(folder: SweepFolder) -> list[CellState]:
    """Make all cells in this process."""
    return drive(folder, Here(), quietly)
