"""The edits that a living model holds, found by what they are about; never all of them in memory at once."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from everedit.edit import Edit
from everedit.ledger.records import Draft, EditRecord, HeldEdit

__all__ = ["HeldEdits"]

# Edits first: that is where the indices are, and rows come in the order of the line, so that a search may end early.
# And what has forgotten an edit before what is active, which is nearly everything.
_HELD = (
    "FROM edits e CROSS JOIN commits c ON c.seq = e.seq WHERE c.active = 1 AND NOT EXISTS (SELECT 1 FROM forgotten f "
    "CROSS JOIN commits d WHERE d.seq = f.seq AND f.row = e.row AND d.active = 1)"
)
_COLUMNS = "e.row, c.id, e.record"


@dataclass(frozen=True)
class HeldEdits:
    """Queries over the edits of a ledger. An edit is held if its commit is on the model's line and nothing on that line
    has forgotten it.
    """

    connection: sqlite3.Connection

    def insert(self, seq: int, draft: Draft, texts: Sequence[str]) -> None:
        """Write the edits of a commit, inside its transaction."""
        for place, (record, text) in enumerate(zip(draft.edits, texts, strict=True)):
            edit = record.edit
            about = (_fold(edit.prompt), _fold(edit.subject), _fold(edit.target_new), _fold(edit.relation))
            row = self.connection.execute(
                "INSERT INTO edits (seq, place, id, prompt, subject, target, relation, until, record) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (seq, place, edit.id, *about, record.until, text),
            ).lastrowid
            if draft.keys:
                self.connection.execute("INSERT INTO keys VALUES (?, ?)", (row, draft.keys[place]))
        self.connection.executemany("INSERT INTO forgotten VALUES (?, ?)", [(row, seq) for row in draft.forgets])

    def of_commit(self, seq: int, commit: str) -> tuple[HeldEdit, ...]:
        """Return all edits of a commit, held or not."""
        rows = self.connection.execute("SELECT row, record FROM edits WHERE seq = ? ORDER BY place", (seq,))
        return tuple(HeldEdit(row, commit, EditRecord.from_text(text)) for row, text in rows)

    def __iter__(self) -> Iterator[HeldEdit]:
        """Yield all edits that the model holds, the oldest first."""
        return self._where("", order="ORDER BY e.row")

    def __len__(self) -> int:
        return int(self.connection.execute(f"SELECT COUNT(*) {_HELD}").fetchone()[0])

    def __contains__(self, row: int) -> bool:
        return bool(self.connection.execute(f"SELECT 1 {_HELD} AND e.row = ?", (row,)).fetchall())

    def rows(self, rows: Sequence[int]) -> list[HeldEdit]:
        """Return the edits of these rows that are held."""
        return [held for row in rows for held in self._where("AND e.row = ?", row)]

    def same(self, edit: Edit) -> list[HeldEdit]:
        """Return the held edits that say exactly this."""
        return list(self._where("AND e.id = ?", edit.id))

    def about(self, edit: Edit) -> list[HeldEdit]:
        """Return the held edits that share the edit's prompt, or its subject and relation."""
        found = {held.row: held for held in self._where("AND e.prompt = ?", _fold(edit.prompt))}
        if edit.subject and edit.relation:
            where = "AND e.subject = ? AND e.relation = ?"
            found |= {held.row: held for held in self._where(where, _fold(edit.subject), _fold(edit.relation))}
        return list(found.values())

    def reverses(self, edit: Edit) -> list[HeldEdit]:
        """Return the held edits whose target is the edit's subject and whose subject is its target."""
        if edit.subject is None:
            return []
        where = "AND e.target = ? AND e.subject = ?"
        return list(self._where(where, _fold(edit.subject), _fold(edit.target_new)))

    def expired(self, today: str) -> list[HeldEdit]:
        """Return the held edits that no longer hold on a day (ISO 8601)."""
        return list(self._where("AND e.until != '' AND e.until < ?", today, order="ORDER BY e.until"))

    def sample(self, count: int, seed: str) -> list[HeldEdit]:
        """Return up to ``count`` held edits, drawn with a seed."""
        few = list(self._where("", order=f"ORDER BY e.row DESC LIMIT {count + 1}"))
        if len(few) <= count:
            return few
        last = few[0].row
        draw, found = random.Random(seed), dict[int, HeldEdit]()
        for _ in range(2 * count):
            for held in self._where("AND e.row >= ?", draw.randint(1, last), order="ORDER BY e.row LIMIT 1"):
                found.setdefault(held.row, held)
            if len(found) == count:
                break
        return list(found.values())

    def norms(self, last: int) -> list[float]:
        """Return the norms of the last edits' changes."""
        query = "SELECT norm FROM commits WHERE active = 1 AND kind = 'edit' ORDER BY number DESC LIMIT ?"
        return [row[0] for row in self.connection.execute(query, (last,))]

    def key_rows(self, at_once: int = 1024) -> Iterator[list[tuple[int, bytes]]]:
        """Yield rows and keys of all held edits that have one, some at a time."""
        cursor = self.connection.execute(
            f"SELECT e.row, k.key {_HELD.replace('WHERE', 'CROSS JOIN keys k ON k.row = e.row WHERE', 1)}"
        )
        while part := cursor.fetchmany(at_once):
            yield part

    def _where(self, condition: str, *values: object, order: str = "") -> Iterator[HeldEdit]:
        query = f"SELECT {_COLUMNS} {_HELD} {condition} {order}"
        for row, commit, text in self.connection.execute(query, values):
            yield HeldEdit(row, commit, EditRecord.from_text(text))


def _fold(text: str | None) -> str:
    return (text or "").casefold()
