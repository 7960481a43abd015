"""What is known of a data set, and the registry of those that have a loader: one file each in ``sets``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everedit.data import sets
from everedit.errors import EditError, near_names

__all__ = ["DataSet", "Fields", "Record", "data_names", "data_set"]

Record = dict[str, Any]
Fields = dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """A data set of the literature, or a form of the user's own.

    ``convert`` turns one record into the fields of an edit, or of several that belong together. ``protocols`` are those
    that its scores are published under, the usual one first; an empty tuple stands for data that any protocol may suit.
    ``files`` are its usual names inside a folder, ``hub`` is ``owner/name/file`` of a copy on the Hugging Face hub. A
    subject that ``subject_may_be_elsewhere`` than in the prompt is left out of the edit there; else it is an error.
    ``columns`` are those that a CSV file must have, each in one of its spellings.
    """

    title: str
    licence: str
    convert: Callable[[Record], Fields | Sequence[Fields]]
    protocols: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    hub: str = ""
    paper: str = ""
    notes: str = ""
    built_in: Path | None = None
    subject_may_be_elsewhere: bool = False
    columns: tuple[tuple[str, ...], ...] = ()

    def about(self) -> dict[str, Any]:
        """Return what is worth showing, as plain values."""
        return {
            "title": self.title,
            "licence": self.licence,
            "paper": self.paper,
            "protocols": list(self.protocols),
            "files": list(self.files),
            "hub": self.hub,
            "ships": self.built_in is not None,
            "notes": self.notes,
        }

    def require_protocols(self, name: str, wanted: Sequence[str], for_any: Sequence[str]) -> None:
        """Raise :class:`EditError` if a protocol is neither for any data nor one of this data set's."""
        foreign = [protocol for protocol in wanted if protocol not in (*for_any, *self.protocols)]
        if self.protocols and foreign:
            raise EditError(
                what=f"the data set '{name}' is not scored under {' or '.join(foreign)}",
                fix=f"its own protocols are {', '.join(self.protocols)}; for any data: {', '.join(for_any)}",
            )


def data_names() -> list[str]:
    """Return the names of all data sets; a file's name with ``_`` as ``-``. Imports none of them."""
    found = (module.name for module in pkgutil.iter_modules(sets.__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def data_set(name: str) -> DataSet:
    """Return the data set called ``name``. Raises :class:`everedit.errors.UnknownName` with near names."""
    if (known := name.replace("_", "-")) not in data_names():
        raise near_names("data set", name, data_names())
    module = importlib.import_module(f"{sets.__name__}.{known.replace('-', '_')}")
    found: DataSet = module.SET
    return found
