"""Who makes the cells of a sweep: processes on this machine. See ``cluster.py`` for a Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from everedit.cache import write_json
from everedit.experiments.sweeps.work import Job, failure
from everedit.report.sweep_files import ERROR, PROGRESS

__all__ = ["LocalWorkers", "Workers", "lost"]

LOG = "worker.log"
_COMMAND = "from everedit.experiments.sweeps.work import main; main()"
_GLANCE_SECONDS = 0.05


class Workers(Protocol):
    """Makes jobs side by side. A job that has ended has left its result, or why there is none, in its folder."""

    def free(self) -> bool:
        """Whether another job may be given."""

    def give(self, job: Job) -> None:
        """Begin a job."""

    def ended(self, seconds: float) -> list[Job]:
        """Return the jobs that have ended since, after at most so many seconds of waiting for one."""

    def close(self) -> None:
        """Stop whatever is still going on; what was saved stays."""


class LocalWorkers:
    """A process for each cell, ``jobs`` at a time, so that a cell's memory is its own and its end is no other's.

    With ``gpus``, there is one place for each of them, and the process there sees that GPU alone.
    """

    def __init__(self, jobs: int, gpus: Sequence[str] = ()) -> None:
        self._gpus: list[str | None] = list(gpus) or [None] * jobs
        self._running: list[tuple[Job, subprocess.Popen[str], str | None]] = []

    def free(self) -> bool:
        """Whether a place is free."""
        return bool(self._gpus)

    def give(self, job: Job) -> None:
        """Start a process for a job."""
        gpu = self._gpus.pop(0)
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        with (Path(job.folder) / LOG).open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=environment,
                # An interruption from the keyboard is this process's to handle.
                start_new_session=True,
            )
        assert process.stdin is not None
        # One that has ended before it could read its job is found among those that have ended.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job.as_dict()) + "\n")
            process.stdin.flush()
        self._running.append((job, process, gpu))

    def ended(self, seconds: float) -> list[Job]:
        """Return the jobs whose process has ended."""
        end = time.monotonic() + seconds
        while True:
            over = [entry for entry in self._running if entry[1].poll() is not None]
            if over or time.monotonic() >= end:
                break
            time.sleep(_GLANCE_SECONDS)
        for job, process, gpu in over:
            self._running.remove((job, process, gpu))
            self._gpus.append(gpu)
            _shut(process)
            if process.returncode:
                lost(job, _how_it_ended(process.returncode))
            _drop_if_empty(Path(job.folder) / LOG)
        return [job for job, _, _ in over]

    def close(self) -> None:
        """Kill every process; each has saved its last finished edit."""
        for _, process, _ in self._running:
            process.kill()
        for _, process, _ in self._running:
            process.wait()
            _shut(process)
        self._running.clear()


def lost(job: Job, what: str) -> None:
    """Write down that a job ended, unless it has said itself why."""
    folder = Path(job.folder)
    (folder / PROGRESS).unlink(missing_ok=True)
    if not (folder / ERROR).exists():
        fix = f"look at {LOG} there; if memory ran out, make fewer cells at a time (--jobs)"
        write_json(folder / ERROR, failure("Lost", what, job.folder, fix))


def _drop_if_empty(file: Path) -> None:
    if file.exists() and not file.stat().st_size:
        file.unlink()


def _shut(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError):
            process.stdin.close()


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with status {code}"
