"""Who hears what long work is doing."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Reporter", "Silent"]


class Reporter(Protocol):
    """Hears what a run is doing; the command line shows it, tests and notebooks need not."""

    def stage(self, text: str, total: int | None = None) -> None:
        """A new stage begins, of ``total`` steps if they are known."""

    def step(self, done: int, note: str = "") -> None:
        """The present stage has come to ``done``."""


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str, total: int | None = None) -> None:
        """Ignore it."""

    def step(self, done: int, note: str = "") -> None:
        """Ignore it."""
