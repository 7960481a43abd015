"""One cell of a sweep, in a process of its own that is given its job on standard input.

The same function is what a Ray worker runs. All that it has to say is in the cell's folder: how far it is
(``progress.json``), why it failed (``error.json``), and the run's own files.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from everedit.cache import write_json
from everedit.errors import EvereditError
from everedit.experiments.config import RunConfig
from everedit.experiments.rollback import rollback_run
from everedit.experiments.run import resume, start
from everedit.report import can_report, write_report
from everedit.report.sweep_files import ERROR, PROGRESS

__all__ = ["Job", "failure", "work"]

_SECONDS_BETWEEN_SIGNS = 0.5


@dataclass(frozen=True)
class Job:
    """What a worker needs to know of a cell; plain values, so that any kind of worker can be told."""

    name: str
    kind: str
    config: dict[str, Any]
    untouched: int
    folder: str
    cwd: str
    threads: int
    command: str
    shared: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class _Signs:
    """A reporter that leaves a sign of life in the cell's folder, at most twice a second."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / PROGRESS
        self._stage: dict[str, Any] = {"stage": "", "total": None, "done": 0, "note": ""}
        self._last = float("-inf")

    def stage(self, text: str, total: int | None = None) -> None:
        """Say what is done now."""
        self._stage = {"stage": text, "total": total, "done": 0, "note": ""}
        self._sign()

    def step(self, done: int, note: str = "") -> None:
        """Say how far it is."""
        self._stage |= {"done": done, "note": note or self._stage["note"]}
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_SIGNS:
            self._sign()

    def _sign(self) -> None:
        write_json(self._file, self._stage)
        self._last = time.monotonic()


def work(job: dict[str, Any]) -> bool:
    """Make a cell, or go on with it, and return whether it is done; why it is not is in its folder."""
    told = Job(**job)
    folder = Path(told.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    try:
        os.chdir(told.cwd)
        _make(told, folder)
    except EvereditError as error:
        write_json(folder / ERROR, failure(type(error).__name__, error.what, error.where, error.fix))
    except Exception as error:
        # Whatever it is, for instance memory that ran out, it must not take the other cells with it.
        problem = failure(type(error).__name__, str(error) or repr(error))
        write_json(folder / ERROR, {**problem, "traceback": traceback.format_exc()})
    (folder / PROGRESS).unlink(missing_ok=True)
    return not (folder / ERROR).exists()


def failure(kind: str, what: str, where: str = "", fix: str = "") -> dict[str, Any]:
    """Return what is kept of a failure."""
    return {"error": kind, "what": what, "where": where, "fix": fix}


def _make(job: Job, folder: Path) -> None:
    torch.set_num_threads(job.threads)
    config = RunConfig.model_validate(job.config)
    signs = _Signs(folder)
    if job.kind == "rollback":
        rollback_run(config, job.untouched, folder, signs)
        return
    if (folder / "config.json").exists():
        resume(folder, reporter=signs, shared=Path(job.shared))
    else:
        start(config, folder, reporter=signs, command=job.command, shared=Path(job.shared))
    if can_report():
        write_report(folder)


def _leave_with_the_parent() -> None:
    """End this process when the one that started it has, however that ended: two must not write in one folder."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Read a job from standard input, which stays open as long as the parent lives, and do it."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    done = work(job)
    sys.stdout.flush()
    # The thread that waits for the parent would hold up an ordinary end.
    os._exit(0 if done else 1)
