"""The tables of a ledger, version by version, and how an older one is brought up to date.

The version stands in the file (``PRAGMA user_version``). ``MIGRATIONS[n]`` leads from version n to n + 1; an entry is
never changed once it was released, so that every ledger ever written has a way to the present.
"""

from __future__ import annotations

import sqlite3

from everedit.errors import LedgerError

__all__ = ["MIGRATIONS", "VERSION", "migrate", "require_tables"]

_FIRST = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # What the id of a commit covers is in `record` and in its edits' records; all other columns say it again, to find
    # it by, and `active` whether the commit is on the line that the model stands on.
    "CREATE TABLE commits (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, parent TEXT NOT NULL, "
    "number INTEGER NOT NULL, active INTEGER NOT NULL, kind TEXT NOT NULL, norm REAL NOT NULL, size INTEGER NOT NULL, "
    "record TEXT NOT NULL)",
    "CREATE INDEX commits_active ON commits (active, number)",
    "CREATE INDEX commits_parent ON commits (parent)",
    "CREATE TABLE edits (row INTEGER PRIMARY KEY, seq INTEGER NOT NULL REFERENCES commits (seq), "
    "place INTEGER NOT NULL, id TEXT NOT NULL, prompt TEXT NOT NULL, subject TEXT NOT NULL, target TEXT NOT NULL, "
    "relation TEXT NOT NULL, until TEXT NOT NULL, record TEXT NOT NULL)",
    "CREATE INDEX edits_seq ON edits (seq, place)",
    "CREATE INDEX edits_id ON edits (id)",
    "CREATE INDEX edits_prompt ON edits (prompt)",
    "CREATE INDEX edits_subject ON edits (subject)",
    "CREATE INDEX edits_target ON edits (target)",
    "CREATE TABLE keys (row INTEGER PRIMARY KEY REFERENCES edits (row), key BLOB NOT NULL)",
    "CREATE TABLE forgotten (row INTEGER NOT NULL REFERENCES edits (row), seq INTEGER NOT NULL "
    "REFERENCES commits (seq), PRIMARY KEY (row, seq))",
    "CREATE TABLE events (seq INTEGER PRIMARY KEY, at TEXT NOT NULL, by TEXT NOT NULL, action TEXT NOT NULL, "
    "edit TEXT NOT NULL, info TEXT NOT NULL)",
    "CREATE INDEX events_edit ON events (edit)",
    "CREATE TABLE snapshots (id TEXT PRIMARY KEY, number INTEGER NOT NULL, blob TEXT NOT NULL, size INTEGER NOT NULL)",
)

MIGRATIONS: tuple[tuple[str, ...], ...] = (_FIRST,)
VERSION = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, where: str) -> None:
    """Bring a ledger, or an empty file, to the present version, whole or not at all.

    Raises :class:`LedgerError` if it was written by a newer version.
    """
    [(version,)] = connection.execute("PRAGMA user_version").fetchall()
    if version > VERSION:
        raise LedgerError(
            what=f"this ledger is of version {version}, and this Everedit knows versions up to {VERSION}",
            where=where,
            fix="update Everedit: pip install -U everedit",
        )
    if version == VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    for step in MIGRATIONS[version:]:
        for statement in step:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def require_tables(connection: sqlite3.Connection, where: str) -> None:
    """Raise :class:`LedgerError` unless the file holds exactly the tables and indices of the present version.

    A file from a stranger may hold triggers and views, which would do things of their own.
    """
    fresh = sqlite3.connect(":memory:")
    for step in MIGRATIONS:
        for statement in step:
            fresh.execute(statement)
    listed = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    expected, found = fresh.execute(listed).fetchall(), connection.execute(listed).fetchall()
    fresh.close()
    if found != expected:
        odd = sorted({str(row[1]) for row in set(found) ^ set(expected)})
        raise LedgerError(
            what=f"this is no ledger as Everedit writes it: {', '.join(odd)[:200]}",
            where=where,
            fix="restore the folder from a copy",
        )
