"""The journal: an SQLite file in WAL mode with full synchronisation. A commit is in it as a whole or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Self

from everedit.errors import LedgerError
from everedit.ledger.held import HeldEdits
from everedit.ledger.reading import BASE, FILE, Reading, damaged, explained
from everedit.ledger.records import Draft, Event, as_text, commit_id
from everedit.ledger.schema import migrate, require_tables
from everedit.ledger.witness import Witness

__all__ = ["BASE", "Ledger"]


# Nothing in the file may act by itself; what was committed is on disk; sorting needs no room there.
_PRAGMAS = (
    "trusted_schema = OFF", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY"
)  # fmt: skip


@dataclass
class Ledger(Reading):
    """The records of a living model."""

    witness: Witness

    @classmethod
    def create(cls, folder: Path, about: dict[str, Any]) -> Ledger:
        """Make an empty ledger in a folder; ``about`` is what it says of itself."""
        ledger = cls._connected(folder, must_exist=False)
        migrate(ledger.connection, str(folder))
        with ledger._transaction():
            values = {**about, "head": "", "generation": 0}
            ledger.connection.executemany(
                "INSERT INTO about VALUES (?, ?)", [(key, as_text(value)) for key, value in values.items()]
            )
        return ledger

    @classmethod
    def open(cls, folder: Path) -> Ledger:
        """Open the ledger of a folder.

        Raises :class:`LedgerError` if there is none, if it is damaged or of a newer version, or lacks what was
        acknowledged.
        """
        ledger = cls._connected(folder, must_exist=True)
        try:
            with explained(folder):
                migrate(ledger.connection, str(folder))
                [(state,), *_] = ledger.connection.execute("PRAGMA quick_check").fetchall()
                if state != "ok":
                    raise damaged(folder, f"the file's own check says: {state}")
                require_tables(ledger.connection, str(folder / FILE))
                ledger.witness.compare(ledger._about("generation"), ledger.head)
        except LedgerError:
            ledger.close()
            raise
        return ledger

    @classmethod
    def _connected(cls, folder: Path, *, must_exist: bool) -> Ledger:
        file = folder / FILE
        if must_exist and not file.is_file():
            raise LedgerError(
                what="there is no living model here", where=str(folder), fix=f"make one: everedit init {folder.name}"
            )
        with explained(folder):
            connection = sqlite3.connect(file, isolation_level=None, timeout=30)
            try:
                for pragma in _PRAGMAS:
                    connection.execute(f"PRAGMA {pragma}")
            except sqlite3.Error:
                connection.close()
                raise
        return cls(folder, connection, HeldEdits(connection), Witness(folder / "head"))

    def close(self) -> None:
        """Let go of the file."""
        self.connection.close()

    def __enter__(self) -> Self:
        """Return the ledger itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    # ------------------------------------------------------------------ writing

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with explained(self.folder):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
        self.witness.write(self.about("generation"), self.head)

    def append(
        self, drafts: Sequence[Draft], parent: str, event: Event | None = None, *, pending: str | None = None
    ) -> list[str]:
        """Write commits, each on the one before it, the first on ``parent``, and let the model stand on the last.

        ``pending`` names the tensors of values found ahead of time, from now on; None: the same as before.
        Either all of it is on disk when this returns, or nothing is and :class:`LedgerError` is raised.
        """
        ids = []
        with self._transaction():
            for draft in drafts:
                parent = self._insert(draft, parent)
                ids.append(parent)
            self._stand_on(parent)
            if event is not None:
                self._insert_event(event)
            if pending is not None:
                self.connection.execute("UPDATE about SET value = ? WHERE key = 'pending'", (as_text(pending),))
        return ids

    def _insert(self, draft: Draft, parent: str) -> str:
        edits = [as_text(record.as_dict()) for record in draft.edits]
        record = draft.text()
        made = commit_id(parent, record, edits)
        number = 1 + self._number(parent)
        values = (made, parent, number, draft.kind, draft.norm, draft.size, record)
        insert = "INSERT INTO commits (id, parent, number, active, kind, norm, size, record) "
        seq = self.connection.execute(f"{insert} VALUES (?, ?, ?, 0, ?, ?, ?, ?)", values).lastrowid
        assert seq is not None
        self.held.insert(seq, draft, edits)
        return made

    def _number(self, commit: str) -> int:
        rows = self.connection.execute("SELECT number FROM commits WHERE id = ?", (commit,)).fetchall()
        if commit and not rows:
            raise LedgerError(what=f"there is no commit {commit[:12]}", where=str(self.folder), fix="see everedit log")
        return int(rows[0][0]) if rows else 0

    def _stand_on(self, head: str) -> None:
        """Make ``head`` the head, and mark the commits on its line."""
        fork, fresh = head, []
        while fork:
            [(parent, active)] = self.connection.execute(
                "SELECT parent, active FROM commits WHERE id = ?", (fork,)
            ).fetchall()
            if active:
                break
            fresh.append((fork,))
            fork = parent
        self.connection.execute("UPDATE commits SET active = 0 WHERE active = 1 AND number > ?", (self._number(fork),))
        self.connection.executemany("UPDATE commits SET active = 1 WHERE id = ?", fresh)
        self.connection.execute("UPDATE about SET value = ? WHERE key = 'head'", (as_text(head),))
        self._next_generation()

    def _next_generation(self) -> None:
        self.connection.execute("UPDATE about SET value = CAST(value AS INTEGER) + 1 WHERE key = 'generation'")

    def move(self, head: str, event: Event) -> None:
        """Let the model stand on another commit, and say why."""
        with self._transaction():
            self._number(head)
            self._stand_on(head)
            self._insert_event(event)

    def note(self, *events: Event) -> None:
        """Write down events that change nothing."""
        with self._transaction():
            for event in events:
                self._insert_event(event)
            self._next_generation()

    def _insert_event(self, event: Event) -> None:
        values = (event.at, event.by, event.action, str(event.info.get("edit", "")), as_text(event.info))
        self.connection.execute("INSERT INTO events (at, by, action, edit, info) VALUES (?, ?, ?, ?, ?)", values)

    def keep_snapshots(self, snapshots: Sequence[tuple[str, int, str, int]]) -> None:
        """Let these be the snapshots."""
        with self._transaction():
            self.connection.execute("DELETE FROM snapshots")
            self.connection.executemany("INSERT INTO snapshots VALUES (?, ?, ?, ?)", snapshots)
