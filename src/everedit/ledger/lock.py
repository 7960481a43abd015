"""One writer at a time: a lock that the system takes back from a process that ends, however it ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from everedit.errors import LedgerError, LedgerLocked

__all__ = ["WriterLock"]

_PAUSE = 0.05


@dataclass
class WriterLock:
    """The right to write to a living model's folder. A process that holds it may take it again."""

    path: Path
    _depth: int = 0

    @contextmanager
    def held(self, wait: float = 0.0) -> Iterator[bool]:
        """Hold the lock while the block runs; gives whether it was taken just now.

        ``wait`` is for how many seconds another writer may finish first. Raises :class:`LedgerLocked` if it does not.
        """
        if self._depth:
            yield False
            return
        handle = self._opened()
        try:
            self._take(handle, time.monotonic() + wait)
            self._depth += 1
            try:
                yield True
            finally:
                self._depth -= 1
        finally:
            os.close(handle)

    def _opened(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LedgerError(
                what=f"this living model cannot be written to: {error.strerror}",
                where=str(self.path.parent),
                fix="give yourself the right to write there",
            ) from error

    def _take(self, handle: int, deadline: float) -> None:
        lock = _system_lock()
        while True:
            try:
                lock(handle)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip("\0 \n")
                    raise LedgerLocked(
                        what=f"another process is writing to this living model ({holder or 'unknown'})",
                        where=str(self.path.parent),
                        fix="wait until it is done, for example with --wait 60",
                    ) from None
                time.sleep(_PAUSE)
        # Who holds it is for others to read; the lock holds without it, too.
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)


def _system_lock() -> Callable[[int], None]:
    try:
        import fcntl
    except ImportError as error:  # not a POSIX system
        raise LedgerError(
            what="living models need file locks as POSIX systems have them", fix="use Linux, macOS or WSL"
        ) from error

    def lock(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    return lock
