"""Tensors in files that are named by their hash: written and on disk before anything speaks of them."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from everedit.cache import file_sha256, to_disk
from everedit.errors import CacheError, LedgerError
from everedit.patch import load_tensors, save_tensors

__all__ = ["Blobs"]

_HASH = re.compile(r"[0-9a-f]{64}")
_ENDING = ".safetensors"
_INCOMING = "incoming-"


@dataclass(frozen=True)
class Blobs:
    """A folder of safetensors files. A name is the SHA-256 of the bytes, so that a file is right or is not there."""

    folder: Path

    def put(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> tuple[str, int]:
        """Write tensors and JSON-like ``info``; return the hash and the size in bytes.

        The file is whole, in place and on disk when this returns. Raises :class:`LedgerError` if it cannot be.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=_INCOMING) as aside:
                file = Path(aside) / "blob"
                save_tensors(file, tensors, info)
                name, size = file_sha256(file), file.stat().st_size
                to_disk(file)
                place = self._path(name)
                fresh = not place.parent.is_dir()
                place.parent.mkdir(exist_ok=True)
                os.replace(file, place)
            to_disk(place.parent)
            if fresh:
                to_disk(self.folder)
        except (OSError, CacheError) as error:
            raise LedgerError(
                what=f"the tensors of the edit cannot be written: {getattr(error, 'strerror', None) or error}",
                where=str(self.folder),
                fix="make room or give yourself the right to write there; nothing has changed",
            ) from error
        return name, size

    def get(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and info. Raises :class:`LedgerError` unless the file holds exactly what was written."""
        path = self._path(name)
        try:
            found = file_sha256(path)
        except OSError as error:
            raise _damaged(path, f"cannot be read: {error.strerror or error}") from error
        if found != name:
            raise _damaged(path, "does not hold what was written: its hash is another")
        try:
            return load_tensors(path)
        except CacheError as error:
            raise _damaged(path, f"is no file of tensors: {error.what}") from error

    def _path(self, name: str) -> Path:
        # What is not a hash could lead anywhere.
        if not _HASH.fullmatch(name):
            raise LedgerError(
                what=f"'{name[:80]}' is no name of a file of tensors", where=str(self.folder), fix="restore a copy"
            )
        return self.folder / name[:2] / f"{name[2:]}{_ENDING}"

    def has(self, name: str) -> bool:
        """Whether there is such a file; not whether it is sound."""
        return self._path(name).is_file()

    def drop(self, name: str) -> None:
        """Remove a file that nothing needs any more."""
        self._path(name).unlink(missing_ok=True)

    def names(self) -> Iterator[str]:
        """Yield the names of all files."""
        for path in self.folder.glob(f"??/*{_ENDING}"):
            yield path.parent.name + path.name.removesuffix(_ENDING)

    def sweep(self) -> None:
        """Remove what writers that were killed have left half-written; only while no other writer is at work."""
        for aside in self.folder.glob(f"{_INCOMING}*"):
            for file in aside.iterdir():
                file.unlink()
            aside.rmdir()


def _damaged(path: Path, problem: str) -> LedgerError:
    return LedgerError(
        what=f"a file of the ledger {problem}", where=str(path), fix="restore the folder from a copy; see everedit log"
    )
