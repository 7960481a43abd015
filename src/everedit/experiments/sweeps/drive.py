"""Make the cells of a sweep that are not made yet, and tell how far all of them are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everedit.experiments.sweeps.cells import Cell
from everedit.experiments.sweeps.folder import SweepFolder
from everedit.experiments.sweeps.work import Job
from everedit.experiments.sweeps.workers import Workers
from everedit.report.sweep_files import ERROR, PROGRESS, Status, read_if_there, why_failed

__all__ = ["CellState", "drive", "states_of"]

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class CellState:
    """How far a cell is. ``note`` is its latest score or, of one that failed or is skipped, the reason."""

    cell: Cell
    status: Status
    stage: str = ""
    done: int = 0
    total: int | None = None
    note: str = ""
    seconds: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.cell.name, **self.cell.axes, "status": self.status, "note": self.note}


Watch = Callable[[Sequence[CellState]], None]


@dataclass
class _Drive:
    folder: SweepFolder
    workers: Workers
    watch: Watch
    began: dict[str, float] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)

    def go(self) -> None:
        cells = self.folder.manifest.cells
        waiting = [cell for cell in cells if self.folder.status(cell) in ("waiting", "failed")]
        while waiting or self.began:
            while waiting and self.workers.free():
                cell = waiting.pop(0)
                (self.folder.cell(cell) / ERROR).unlink(missing_ok=True)
                self.workers.give(_job(self.folder, cell))
                self.began[cell.name] = time.monotonic()
            for job in self.workers.ended(_SECONDS_BETWEEN_LOOKS):
                self.took[job.name] = time.monotonic() - self.began.pop(job.name)
            self.watch([self.state(cell) for cell in cells])

    def state(self, cell: Cell) -> CellState:
        found = _state(self.folder, cell)
        if cell.name in self.began:
            seconds = time.monotonic() - self.began[cell.name]
            return CellState(cell, "running", seconds=seconds, **_progress(self.folder.cell(cell)))
        return CellState(cell, found.status, note=found.note, seconds=self.took.get(cell.name))


def drive(folder: SweepFolder, workers: Workers, watch: Watch) -> list[CellState]:
    """Make every cell that is neither done nor skipped, and return how all of them ended.

    Cells that failed before are tried again. ``watch`` hears how far each is, about twice a second. A cell that fails
    leaves the others alone; an interruption stops the workers, and everything finished is kept.

    Raises :class:`everedit.errors.CacheError` if another process is at work on the sweep.
    """
    with folder.alone():
        try:
            _Drive(folder, workers, watch).go()
        finally:
            workers.close()
    return states_of(folder)


def states_of(folder: SweepFolder) -> list[CellState]:
    """Return how far each cell of a sweep is, as the folders tell."""
    return [_state(folder, cell) for cell in folder.manifest.cells]


def _state(folder: SweepFolder, cell: Cell) -> CellState:
    status = folder.status(cell)
    return CellState(cell, status, note=why_failed(folder.cell(cell)) if status == "failed" else cell.skipped)


def _job(folder: SweepFolder, cell: Cell) -> Job:
    manifest = folder.manifest
    return Job(
        name=cell.name,
        kind=manifest.kind,
        config=cell.config.model_dump(mode="json"),
        untouched=manifest.untouched,
        folder=str(folder.cell(cell).resolve()),
        cwd=manifest.cwd or str(Path.cwd()),
        threads=manifest.threads,
        command=manifest.command,
        shared=str(folder.path.resolve()),
    )


def _progress(folder: Path) -> dict[str, Any]:
    found = read_if_there(folder / PROGRESS)
    return {"stage": "starting", **{key: found[key] for key in ("stage", "done", "total", "note") if key in found}}
