"""Everything that is read from a ledger: commits and lines of commits, each checked against its id, and events."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everedit.errors import LedgerError
from everedit.ledger.held import HeldEdits
from everedit.ledger.records import CommitRecord, Draft, Event, HeldEdit, commit_id

__all__ = ["BASE", "FILE", "Reading", "damaged", "explained"]

BASE = "base"
"""The name of the unedited model, where a commit is named."""
FILE = "ledger.db"
_SHORTEST = 4
_HEX = re.compile(r"[0-9a-f]+")
# The commits of a line, from its head back to behind another; a damaged line may be a ring, which UNION ends.
_LINE = (
    "WITH RECURSIVE line (seq, id, parent) AS (SELECT seq, id, parent FROM commits WHERE id = ?1 AND id != ?2 "
    "UNION SELECT c.seq, c.id, c.parent FROM commits c JOIN line ON c.id = line.parent WHERE c.id != ?2) "
    "SELECT seq, id, parent FROM line"
)


@dataclass
class Reading:
    """The part of a ledger that reads. ``head`` names the commit that the model stands on; "" is the base model."""

    folder: Path
    connection: sqlite3.Connection
    held: HeldEdits

    def _about(self, key: str) -> Any:
        rows = self.connection.execute("SELECT value FROM about WHERE key = ?", (key,)).fetchall()
        if not rows:
            raise damaged(self.folder, f"it does not say its {key}")
        return json.loads(rows[0][0])

    def about(self, key: str) -> Any:
        """Return what the ledger says of itself under ``key``. Raises :class:`LedgerError` if it says nothing."""
        with explained(self.folder):
            return self._about(key)

    @property
    def head(self) -> str:
        """The id of the commit that the model stands on; "" is the base model."""
        return str(self.about("head"))

    def line(self, head: str, after: str = "") -> Iterator[tuple[str, Draft]]:
        """Yield the commits from behind ``after`` up to ``head``, each checked against its id.

        Raises :class:`LedgerError` if one is damaged or missing, or if ``after`` is not on the line.
        """
        with explained(self.folder):
            for seq in reversed([seq for seq, _, _ in self.connection.execute(_LINE, (head, after))]):
                [(found, parent, record)] = self.connection.execute(
                    "SELECT id, parent, record FROM commits WHERE seq = ?", (seq,)
                ).fetchall()
                edits = [row[0] for row in self.connection.execute(
                    "SELECT record FROM edits WHERE seq = ? ORDER BY place", (seq,)
                )]  # fmt: skip
                if parent != after or commit_id(parent, record, edits) != found:
                    raise damaged(self.folder, f"commit {found[:12]} is not what its id says")
                yield found, _draft(record)
                after = found
            if after != head:
                raise damaged(self.folder, f"the line of commit {head[:12]} is broken")

    def hashes(self, head: str) -> dict[str, str]:
        """Return the hashes that the tensors and values of ``head`` have, from its whole line, which is checked."""
        found: dict[str, str] = {}
        for _, draft in self.line(head):
            found.update(draft.hashes)
        return {name: value for name, value in found.items() if value}

    def on_line(self, commit: str, head: str) -> bool:
        """Whether ``head`` came from ``commit``, or is it."""
        if commit in ("", head):
            return True
        if head == self.head:
            rows = self.connection.execute("SELECT active FROM commits WHERE id = ?", (commit,)).fetchall()
            return bool(rows and rows[0][0])
        return any(found == commit for _, found, _ in self.connection.execute(_LINE, (head, "")))

    def commit(self, commit: str) -> CommitRecord:
        """Return a commit by its whole id."""
        with explained(self.folder):
            rows = self.connection.execute(
                "SELECT seq, id, parent, number, active, record FROM commits WHERE id = ?", (commit,)
            ).fetchall()
            if not rows:
                raise LedgerError(
                    what=f"there is no commit '{commit[:16]}'", where=str(self.folder), fix="see everedit log"
                )
            return self._record(rows[0])

    def _record(self, row: Sequence[Any]) -> CommitRecord:
        seq, found, parent, number, active, record = row
        edits: tuple[HeldEdit, ...] = self.held.of_commit(seq, found)
        return CommitRecord(seq, found, parent, number, bool(active), _draft(record), edits)

    def held_count(self) -> int:
        """Return how many edits the model holds."""
        with explained(self.folder):
            return len(self.held)

    def back(self, head: str, steps: int) -> str:
        """Return the commit that an undo of ``steps`` commits leads to.

        Raises :class:`LedgerError` if there are not so many.
        """
        for done in range(steps):
            if not head:
                raise LedgerError(
                    what=f"there are only {done} commits to undo, and {steps} are asked for",
                    where=str(self.folder),
                    fix="see everedit log",
                )
            record = self.commit(head)
            head = record.parent if record.draft.back is None else record.draft.back
        return head

    def log(self, limit: int | None = None, *, everything: bool = False) -> Iterator[CommitRecord]:
        """Yield commits, the newest first: those that the model holds, or all that were ever made."""
        where, order = ("", "seq") if everything else ("WHERE active = 1", "number")
        with explained(self.folder):
            query = f"SELECT seq, id, parent, number, active, record FROM commits {where} ORDER BY {order} DESC LIMIT ?"
            for row in self.connection.execute(query, (-1 if limit is None else limit,)):
                yield self._record(row)

    def events(self, limit: int | None = None) -> list[Event]:
        """Return what happened beside the commits, the newest first."""
        with explained(self.folder):
            query = "SELECT at, by, action, info FROM events ORDER BY seq DESC LIMIT ?"
            rows = self.connection.execute(query, (-1 if limit is None else limit,)).fetchall()
        return [Event(at, by, action, json.loads(info)) for at, by, action, info in rows]

    def dealt_with(self, edit: str) -> bool:
        """Whether an edit was refused or set aside before."""
        found = self.connection.execute("SELECT 1 FROM events WHERE edit = ? LIMIT 1", (edit,)).fetchall()
        return bool(found)

    def resolve(self, text: str) -> str:
        """Return the id of the commit that ``text`` names: the beginning of its id or of the id of an edit in it,
        ``head``, or ``base`` for the unedited model (""). Raises :class:`LedgerError` if it names none, or several.
        """
        if text == BASE:
            return ""
        if text == "head":
            return self.head
        names = self._named(text, "SELECT id FROM commits WHERE id >= ? AND id < ? ORDER BY seq")
        # An edit that was made on several lines is looked for on the model's own first.
        names = names or self._named(
            text,
            "SELECT c.id FROM edits e JOIN commits c ON c.seq = e.seq WHERE e.id >= ? AND e.id < ? AND c.active = 1",
        )
        names = names or self._named(
            text, "SELECT c.id FROM edits e JOIN commits c ON c.seq = e.seq WHERE e.id >= ? AND e.id < ?"
        )
        if len(names) == 1:
            return names[0]
        if names:
            shown = ", ".join(name[:12] for name in names[:5])
            raise LedgerError(what=f"'{text}' may mean any of: {shown}", where=str(self.folder), fix="give more digits")
        raise LedgerError(
            what=f"'{text}' names no commit and no edit",
            where=str(self.folder),
            fix=f"give at least {_SHORTEST} digits of an id that everedit log --all shows",
        )

    def _named(self, text: str, query: str) -> list[str]:
        if len(text) < _SHORTEST or not _HEX.fullmatch(text):
            return []
        with explained(self.folder):
            return list(dict.fromkeys(row[0] for row in self.connection.execute(query, (text, text + "g"))))

    def snapshots(self) -> list[tuple[str, int, str, int]]:
        """Return id and number of the commits of which a snapshot is kept, its blob and its size, oldest first."""
        with explained(self.folder):
            query = "SELECT id, number, blob, size FROM snapshots ORDER BY number"
            return [tuple(row) for row in self.connection.execute(query)]

    def blobs_in_use(self) -> set[str]:
        """Return the names of all files of tensors that a commit or a snapshot speaks of."""
        with explained(self.folder):
            commits = {json.loads(row[0])["blob"] for row in self.connection.execute("SELECT record FROM commits")}
        others = {blob for _, _, blob, _ in self.snapshots()} | {str(self.about("pending"))}
        return (commits | others) - {""}

    def size_since(self, number: int) -> int:
        """Return how many bytes the commits of the model's line behind a number take."""
        query = "SELECT COALESCE(SUM(size), 0) FROM commits WHERE active = 1 AND number > ?"
        return int(self.connection.execute(query, (number,)).fetchone()[0])


def _draft(record: str) -> Draft:
    values = json.loads(record)
    return Draft(**{**values, "forgets": tuple(values["forgets"]), "edits": ()})


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn what SQLite, or damaged text, says into one clear error."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise LedgerError(
            what=f"the ledger cannot be used: {error}",
            where=str(folder / FILE),
            fix="make room, give yourself the right to write there, or restore the folder from a copy",
        ) from error
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        if isinstance(error, LedgerError):
            raise
        raise damaged(folder, str(error)) from error


def damaged(folder: Path, problem: str) -> LedgerError:
    """Return the error for a ledger that does not hold together."""
    return LedgerError(
        what=f"the ledger is damaged: {problem}", where=str(folder / FILE), fix="restore the folder from a copy"
    )
