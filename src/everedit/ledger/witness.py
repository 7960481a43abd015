"""A second, tiny file that says how far the ledger has come: without it the loss of SQLite's own log goes unseen.

What was committed last may stand in ``ledger.db-wal`` alone. Whoever copies ``ledger.db`` by itself has a sound ledger
that lacks the last edits; the witness, written after each transaction, tells.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from everedit.errors import LedgerError

__all__ = ["Witness"]

_WIDTH = 96


@dataclass(frozen=True)
class Witness:
    """The file ``head``: the number of transactions so far, and the commit that the model stands on."""

    path: Path

    def write(self, generation: int, head: str) -> None:
        """Say how far the ledger is, in place, on disk when this returns."""
        line = f"{generation} {head or 'base'}".ljust(_WIDTH - 1) + "\n"
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(handle, line.encode(), 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise LedgerError(
                what=f"what was written could not be confirmed: {error.strerror}",
                where=str(self.path),
                fix="make room or give yourself the right to write there; everedit log says what was kept",
            ) from error

    def compare(self, generation: int, head: str) -> None:
        """Raise :class:`LedgerError` if the ledger is not as far as the witness says."""
        try:
            text = self.path.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            # A process may have been killed between making the ledger and its witness.
            return
        except OSError as error:
            raise LedgerError(what=f"cannot be read: {error.strerror}", where=str(self.path)) from error
        said, _, where = text.strip().partition(" ")
        ahead = not said.isdigit() or int(said) > generation
        if ahead or (int(said) == generation and where != (head or "base")):
            raise LedgerError(
                what="the ledger lacks what was acknowledged last, or its witness is damaged",
                where=str(self.path),
                fix="restore the whole folder from a copy, ledger.db-wal included; or delete this file to go on with "
                "what is there",
            )
