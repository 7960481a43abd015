"""Conflicts: edits that contradict each other, or that a method would write to one and the same place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from everedit.edit import Edit
from everedit.errors import LedgerError
from everedit.ledger.held import HeldEdits
from everedit.ledger.records import HeldEdit

__all__ = ["Conflict", "ConflictsConfig", "conflicts_among", "conflicts_of", "key_bytes"]

ConflictKind = Literal["same fact", "reverse fact", "near key"]


class ConflictsConfig(BaseModel):
    """When an edit stands in the way of another."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    near_key: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = Field(
        "auto", description="cosine of two edits' keys from which on they are near; null: not looked at"
    )

    def resolved(self, *, by_subject: bool) -> ConflictsConfig:
        """Return the config with a cosine. Keys at a subject's last token tell subjects apart; those at the last token
        of a prompt are all rather alike.
        """
        if self.near_key != "auto":
            return self
        return self.model_copy(update={"near_key": 0.98 if by_subject else 0.999})


@dataclass(frozen=True)
class Conflict:
    """An edit and one that the model holds already. ``similarity`` is the cosine of near keys."""

    kind: ConflictKind
    edit: Edit
    held: HeldEdit
    similarity: float | None = None

    def __str__(self) -> str:
        """The conflict in words."""
        other = f"'{self.held.edit.prompt}' -> '{self.held.edit.target_new}' (commit {self.held.commit[:12]})"
        if self.kind == "near key":
            return f"it would be written where {other} stands: their keys have a cosine of {self.similarity:.3f}"
        return f"it {'contradicts' if self.kind == 'same fact' else 'is the reverse of'} {other}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "kind": self.kind, "edit": self.edit.id, "prompt": self.edit.prompt, "target_new": self.edit.target_new,
            "with": self.held.edit.id, "with_prompt": self.held.edit.prompt,
            "with_target": self.held.edit.target_new, "with_commit": self.held.commit, "similarity": self.similarity,
        }  # fmt: skip


def key_bytes(keys: Tensor) -> list[bytes]:
    """Return keys (n, d) as unit vectors in half precision, a row each, for the ledger."""
    unit = torch.nn.functional.normalize(keys.detach().double(), dim=1).half().cpu().contiguous()
    return [row.numpy().tobytes() for row in unit]


def conflicts_of(edit: Edit, key: bytes, held: HeldEdits, config: ConflictsConfig) -> list[Conflict]:
    """Return the conflicts of a new edit, whose key is ``key``, with the edits that the model holds.

    The very same edit is no conflict with itself.
    """
    found = {}
    for other in held.about(edit):
        if other.edit.target_new.casefold() != edit.target_new.casefold():
            found[other.row] = Conflict("same fact", edit, other)
    for other in held.reverses(edit):
        found.setdefault(other.row, Conflict("reverse fact", edit, other))
    if isinstance(config.near_key, float):
        mine = _matrix([key], len(key))[0]
        near: dict[int, float] = {}
        for part in held.key_rows():
            cosines = _matrix([other for _, other in part], len(key)) @ mine
            for place in (cosines >= config.near_key).nonzero()[:, 0].tolist():
                near[part[place][0]] = float(cosines[place])
        for other in held.rows([row for row in near if row not in found]):
            if other.edit.id != edit.id:
                found[other.row] = Conflict("near key", edit, other, near[other.row])
    return list(found.values())


def conflicts_among(held: HeldEdits, config: ConflictsConfig) -> Iterator[Conflict]:
    """Yield the conflicts among the edits that the model holds, each once: the newer edit with the older."""
    for item in held:
        about = [other for other in held.about(item.edit) if _target(other) != _target(item)]
        kinds: dict[int, tuple[ConflictKind, HeldEdit]] = {
            other.row: ("reverse fact", other) for other in held.reverses(item.edit)
        }
        kinds |= {other.row: ("same fact", other) for other in about}
        yield from (Conflict(kind, item.edit, other) for row, (kind, other) in kinds.items() if row < item.row)
    if isinstance(config.near_key, float):
        yield from _near(held, config.near_key)


def _target(item: HeldEdit) -> str:
    return item.edit.target_new.casefold()


def _near(held: HeldEdits, bound: float) -> Iterator[Conflict]:
    for part in held.key_rows():
        width = len(part[0][1])
        mine = _matrix([key for _, key in part], width)
        for others in held.key_rows():
            cosines = mine @ _matrix([key for _, key in others], width).T
            for here, there in (cosines >= bound).nonzero().tolist():
                row, other = part[here][0], others[there][0]
                if other < row:
                    [newer, older] = held.rows([row, other])
                    if newer.edit.id != older.edit.id and newer.edit.prompt.casefold() != older.edit.prompt.casefold():
                        yield Conflict("near key", newer.edit, older, float(cosines[here, there]))


def _matrix(keys: list[bytes], width: int) -> Tensor:
    if any(len(key) != width for key in keys) or width % 2:
        raise LedgerError(
            what="a key in the ledger has another length than the method's keys", fix="restore the folder from a copy"
        )
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.float16).view(len(keys), -1).float()
