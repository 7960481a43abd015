"""Times and people, as a ledger writes them."""

from __future__ import annotations

import getpass
from datetime import date, datetime, timezone

from everedit.errors import EditError

__all__ = ["day", "now", "person"]


def now() -> str:
    """Return the time, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def day(text: str) -> str:
    """Return a day as ISO 8601. Raises :class:`EditError` if the text is none."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise EditError(what=f"'{text}' is no date", fix="write it as 2027-06-30") from error


def person(name: str) -> str:
    """Return who acts: the name given, or that of the user of this machine."""
    if name:
        return name
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
