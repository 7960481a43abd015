"""Memory that was freed, given back: on Linux the C library keeps pieces of a tensor's size for itself."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["give_back_memory"]


def give_back_memory() -> None:
    """Ask the C library to return freed memory to the system, where it knows how; a few milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
