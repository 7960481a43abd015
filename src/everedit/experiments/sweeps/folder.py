"""The folder of a sweep: a manifest of its cells, and an ordinary run folder for each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from everedit._version import __version__
from everedit.cache import held, write_json
from everedit.errors import CacheError, RunFolderError
from everedit.experiments.sweeps.cells import Cell
from everedit.report.sweep_files import CELLS, MANIFEST, Status, cell_status

__all__ = ["Manifest", "SweepFolder"]


@dataclass(frozen=True)
class Manifest:
    """What a sweep is. ``source`` is the text of its file; relative paths in it are meant from ``cwd``.

    ``threads`` is how many a cell computes with: it belongs to the sweep, since it decides how sums round.
    """

    title: str
    kind: str
    cells: tuple[Cell, ...]
    threads: int
    untouched: int = 0
    cwd: str = ""
    source: str = ""
    command: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, with what wrote them and when."""
        made = {"everedit": __version__, "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        return {**vars(self), "cells": [cell.as_dict() for cell in self.cells], **made}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Return the manifest that :meth:`as_dict` described."""
        kept = {key: values[key] for key in cls.__dataclass_fields__}
        return cls(**{**kept, "cells": tuple(Cell.from_dict(cell) for cell in values["cells"])})


@dataclass(frozen=True)
class SweepFolder:
    """A sweep on disk. How far it has come is read off its cells' folders, never kept twice."""

    path: Path
    manifest: Manifest

    @classmethod
    def create(cls, path: Path, manifest: Manifest) -> SweepFolder:
        """Make a new sweep's folder. Raises :class:`RunFolderError` if it holds one or cannot be written."""
        for name, holds in ((MANIFEST, "a sweep"), ("config.json", "a run")):
            if (path / name).exists():
                raise RunFolderError(
                    what=f"this folder holds {holds} already",
                    where=str(path),
                    fix=f"go on with it (everedit sweep --resume --out {path}) or choose another --out",
                )
        return cls(path, manifest)._written()

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """Open a sweep's folder. Raises :class:`RunFolderError` if there is none or its manifest is damaged."""
        if not (path / MANIFEST).exists():
            raise RunFolderError(what="there is no sweep to resume", where=str(path), fix="start it without --resume")
        try:
            return cls(path, Manifest.from_dict(json.loads((path / MANIFEST).read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                what=f"cannot read the sweep's manifest: {error}",
                where=str(path / MANIFEST),
                fix="start the sweep anew",
            ) from error

    def extended(self, cells: Sequence[Cell], source: str) -> SweepFolder:
        """Write and return the sweep with the cells of a changed file; those that are as before keep their results.

        Raises :class:`everedit.errors.CacheError` if another process is at work on it.
        """
        with self.alone():
            return replace(self, manifest=replace(self.manifest, cells=tuple(cells), source=source))._written()

    def _written(self) -> SweepFolder:
        try:
            write_json(self.path / MANIFEST, self.manifest.as_dict())
        except CacheError as error:
            raise RunFolderError(
                what="the output folder cannot be written", where=str(self.path), fix="choose another --out"
            ) from error
        return self

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from working on this sweep while the block runs.

        Raises :class:`everedit.errors.CacheError` if one does already.
        """
        with held(self.path, wait=False):
            yield

    def cell(self, cell: Cell) -> Path:
        """Return a cell's run folder."""
        return self.path / CELLS / cell.name

    def status(self, cell: Cell) -> Status:
        """Return how far a cell is, as its folder tells; it cannot tell whether a process is at work on it."""
        return cell_status(self.cell(cell), self.manifest.kind, cell.skipped)

    def strays(self) -> list[str]:
        """Return the cells on disk that the sweep does not have, or no longer has."""
        known = {cell.name for cell in self.manifest.cells}
        folders = (self.path / CELLS).glob("*")
        return sorted(folder.name for folder in folders if folder.is_dir() and folder.name not in known)
