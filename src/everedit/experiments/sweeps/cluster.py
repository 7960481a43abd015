"""The cells of a sweep on a Ray cluster: the same work, and the same folders, which the cluster must be able to see."""

from __future__ import annotations

import os
import socket
from typing import Any

from everedit.errors import EvereditError
from everedit.experiments.sweeps.work import Job, work
from everedit.experiments.sweeps.workers import lost

__all__ = ["RayWorkers"]

LOCAL = "local"
_ANSWER_SECONDS = 5.0


class RayWorkers:
    """Gives every cell to Ray at once and lets it find the places: ``threads`` CPUs and ``gpus`` GPUs for each.

    ``address`` is ``local`` for a Ray of our own on this machine, with room for ``jobs`` cells; ``auto`` for the
    cluster that this machine belongs to; HOST:PORT; or ray://HOST:PORT for Ray's client.

    Raises :class:`EvereditError` if ray is not installed or no cluster answers.
    """

    def __init__(self, address: str, jobs: int, threads: int, gpus: float = 0.0) -> None:
        # Nothing is reported to anyone; a cluster that exists has its own rule.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise EvereditError(
                what="--ray needs a package that is not installed (ray)", fix="pip install 'everedit[ray]'"
            ) from error
        self._ray = ray
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == LOCAL:
            options |= {"num_cpus": jobs * threads, "include_dashboard": False}
        else:
            _require_answer(address)
            options["address"] = address
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise _no_answer(address, str(error)) from error
        # A process for each cell, as on one machine: its memory is its own. A cell that fails is not tried again
        # behind our back.
        self._work = ray.remote(max_calls=1, max_retries=0, num_cpus=threads, num_gpus=gpus)(work)
        self._running: dict[Any, Job] = {}

    def free(self) -> bool:
        """Ray keeps those that must wait."""
        return True

    def give(self, job: Job) -> None:
        """Hand a job to Ray."""
        self._running[self._work.remote(job.as_dict())] = job

    def ended(self, seconds: float) -> list[Job]:
        """Return the jobs whose task has ended."""
        if not self._running:
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        over = []
        for task in ready:
            job = self._running.pop(task)
            try:
                self._ray.get(task)
            except self._ray.exceptions.RayError as error:
                lost(job, f"its Ray worker was lost: {str(error).splitlines()[0]}")
            over.append(job)
        return over

    def close(self) -> None:
        """Cancel what is still going on and leave the cluster; a Ray of our own ends."""
        for task in self._running:
            self._ray.cancel(task, force=True)
        self._running.clear()
        self._ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise :class:`EvereditError` if nothing listens at HOST:PORT: Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdecimal():
        raise EvereditError(
            what=f"'{address}' is no address of a Ray cluster", where="--ray", fix="give HOST:PORT, auto, or nothing"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, str(error)) from error


def _no_answer(address: str, why: str) -> EvereditError:
    return EvereditError(
        what=f"no Ray cluster answers at {address}: {why.splitlines()[0] if why else 'no reason given'}",
        where="--ray",
        fix="start one (ray start --head) or check the address; --ray without one starts a Ray on this machine",
    )
