"""What a ledger holds: commits, the edits in them with who, when and why, and events such as undoing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from everedit.edit import Edit

__all__ = ["CommitRecord", "Draft", "EditRecord", "Event", "HeldEdit", "Kind", "as_text", "commit_id"]

Kind = Literal["edit", "forget", "import"]
Hashes = dict[str, str]


def as_text(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def commit_id(parent: str, record: str, edits: Sequence[str]) -> str:
    """Return the id of a commit: the hash of its record, of its edits' records, and of all that came before it."""
    return hashlib.sha256("\n".join((parent, record, *edits)).encode()).hexdigest()


@dataclass(frozen=True)
class EditRecord:
    """An edit with who made it, when (ISO 8601), from what source, and until when it holds (a date)."""

    edit: Edit
    by: str = ""
    at: str = ""
    source: str = ""
    until: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        about = {"by": self.by, "at": self.at, "source": self.source, "until": self.until}
        return {"edit": self.edit.model_dump(mode="json", exclude_defaults=True), **about}

    @classmethod
    def from_text(cls, text: str) -> EditRecord:
        """Return what :meth:`as_dict` described as JSON."""
        values = json.loads(text)
        return cls(Edit.model_validate(values.pop("edit")), **values)


@dataclass(frozen=True)
class HeldEdit:
    """An edit that a commit made: ``row`` is its number in the ledger, ``commit`` the commit's id."""

    row: int
    commit: str
    record: EditRecord

    @property
    def edit(self) -> Edit:
        """The edit itself."""
        return self.record.edit


@dataclass(frozen=True)
class Draft:
    """A commit that is ready to be written: its tensors are on disk already, in ``blob``.

    ``hashes`` are those of the tensors that it changed, as they are after it. ``forgets`` are the rows of edits that
    no longer hold after it. ``back`` is where an undo of it goes, if not to the commit before it. ``keys`` are what
    near edits are found by, one of each edit.
    """

    kind: Kind
    edits: tuple[EditRecord, ...]
    blob: str
    size: int
    hashes: Hashes
    norm: float
    at: str
    info: dict[str, Any] = field(default_factory=dict)
    forgets: tuple[int, ...] = ()
    back: str | None = None
    keys: tuple[bytes, ...] = ()

    def text(self) -> str:
        """Return the commit's own record, which its id is the hash of."""
        own = {"kind": self.kind, "blob": self.blob, "size": self.size, "hashes": self.hashes, "norm": self.norm}
        return as_text({**own, "at": self.at, "info": self.info, "forgets": self.forgets, "back": self.back})


@dataclass(frozen=True)
class CommitRecord:
    """A commit of the ledger; ``number`` counts from 1 along its line, ``active`` tells whether the model holds it."""

    seq: int
    id: str
    parent: str
    number: int
    active: bool
    draft: Draft
    edits: tuple[HeldEdit, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for ``--json``."""
        draft = self.draft
        return {
            "id": self.id, "parent": self.parent, "number": self.number, "active": self.active, "kind": draft.kind,
            "at": draft.at, "norm": draft.norm, "bytes": draft.size, "blob": draft.blob,
            "edits": [{"id": held.edit.id, **held.record.as_dict()} for held in self.edits], **draft.info,
        }  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that happened beside the commits: an undo, a checkout, a refusal, a record set aside."""

    at: str
    by: str
    action: str
    info: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for ``--json``."""
        return {"at": self.at, "by": self.by, "action": self.action, **self.info}
