"""The process's memory: how much it is, and what was freed given back, which the C library likes to keep for itself."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

__all__ = ["give_back_memory", "peak_memory_mb", "resident_mb"]


def give_back_memory() -> None:
    """Ask the C library to return freed memory to the system, where it knows how; a few milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def resident_mb() -> float:
    """Return the memory that the process holds now, in MiB (its peak where the system does not say)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return peak_memory_mb()
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_memory_mb() -> float:
    """Return the most memory that the process has held, in MiB."""
    # Not every system has it: the package must load without.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
