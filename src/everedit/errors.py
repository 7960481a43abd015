"""Every error a user can meet: each says what happened, where, and what to do about it."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CacheError",
    "EditConflict",
    "EditError",
    "EditRefused",
    "EvereditError",
    "ExportError",
    "LedgerError",
    "LedgerLocked",
    "ModelError",
    "NotApplicable",
    "NumericalError",
    "RunFolderError",
    "TokenError",
    "UnknownName",
    "near_names",
]


class EvereditError(Exception):
    """Base of all errors raised on purpose; catch it to handle any bad input.

    Parameters
    ----------
    what: the problem in one sentence.
    where: the file, record, layer or argument that it concerns.
    fix: what the user can do.
    """

    def __init__(self, *, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        place = f" ({where})" if where else ""
        super().__init__(f"{what}{place}" + (f"\n  -> {fix}" if fix else ""))


class EditError(EvereditError, ValueError):
    """An edit is incomplete, contradicts itself, or cannot be made on this model."""


class TokenError(EvereditError, ValueError):
    """A span could not be found in a text, or a text does not fit the model's context."""


class ModelError(EvereditError, ValueError):
    """A model cannot be loaded, is damaged, or its parts cannot be found."""


class NotApplicable(EvereditError, TypeError):
    """A method or policy cannot work with this model or with this partner."""


class NumericalError(EvereditError, ArithmeticError):
    """A result is not finite or a system is too ill-conditioned; nothing was written."""


class CacheError(EvereditError, OSError):
    """A cached file is damaged or a folder cannot be written."""


class LedgerError(EvereditError, OSError):
    """A living model's folder is missing, damaged, made by another version or for another base, or cannot be written;
    or something is asked of it that it does not hold.
    """


class LedgerLocked(LedgerError):
    """Another process is writing to this living model."""


class EditConflict(EditError):
    """An edit contradicts one that the model holds, or would be written where another one stands."""


class EditRefused(EvereditError, ValueError):
    """An edit was computed and did not pass a gate; the model is as before. ``figures`` are what was measured."""

    def __init__(self, *, what: str, where: str = "", fix: str = "", figures: dict[str, Any] | None = None) -> None:
        super().__init__(what=what, where=where, fix=fix)
        self.figures = figures or {}


class ExportError(EvereditError, OSError):
    """An export cannot be written, or something stands where it should go."""


class RunFolderError(EvereditError, OSError):
    """A run folder is missing, damaged, in use for another run, or cannot be written."""


class UnknownName(EvereditError, KeyError):
    """A name that no registry holds; the message lists near names."""

    def __str__(self) -> str:
        # KeyError would show the repr of its argument, quotes and escapes included.
        return Exception.__str__(self)


def near_names(kind: str, name: str, known: list[str]) -> UnknownName:
    """Return the error for an unknown ``name`` of a ``kind``, with the closest known names."""
    from difflib import get_close_matches

    folded = {item.casefold(): item for item in known}
    near = [folded[item] for item in get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of: {', '.join(sorted(known))}"
    return UnknownName(what=f"unknown {kind} '{name}'", fix=hint)
