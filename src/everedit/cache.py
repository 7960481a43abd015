"""Where results that can be made again are kept, and how a file is written so that it is whole or absent."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from everedit.errors import CacheError, RunFolderError

__all__ = [
    "atomic_folder", "atomic_write", "cache_root", "digest", "file_sha256", "held", "require_writable", "to_disk",
    "write_json", "write_text",
]  # fmt: skip


def cache_root() -> Path:
    """Return the folder for caches: ``$EVEREDIT_CACHE``, else ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("EVEREDIT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "everedit"


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place in one step.

    Raises :class:`CacheError` if the folder cannot be written; an older file at ``path`` stays as it was.
    """
    scratch: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        scratch = Path(name)
        write(scratch)
        # mkstemp makes private files; results are meant to be shared like any other file.
        scratch.chmod(0o644)
        os.replace(scratch, path)
    except OSError as error:
        raise CacheError(
            what=f"cannot write {path.name}: {error.strerror or error}",
            where=str(path.parent),
            fix="choose a folder you may write to and that has space",
        ) from error
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


@contextmanager
def held(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold ``folder``, made if it is not there, against other processes that ask for it, while the block runs.

    Raises :class:`CacheError` if it cannot be written or, unless ``wait``, if another process holds it; a process that
    has ended in any way holds nothing.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise CacheError(
            what="another process is at work in this folder", where=str(folder), fix="wait for it, or stop it"
        ) from error
    except OSError as error:
        raise CacheError(
            what=f"cannot write to the folder: {error.strerror or error}",
            where=str(folder),
            fix="choose a folder you may write to and that has space",
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Let the block fill a folder beside ``path``; at its end that folder becomes ``path``, whole and on disk.

    ``path`` must be absent or an empty folder. Fails with the :class:`OSError` that it meets; nothing is left then. Of
    a process that was killed a hidden folder beside ``path`` is left, and goes with the next one made there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        # Another process may be at the same work.
        with suppress(FileNotFoundError), _held(left) as abandoned:
            if abandoned:
                shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial"))
    try:
        with _held(scratch):
            yield scratch
            # mkdtemp makes private folders, and safetensors private files; results are meant to be shared.
            scratch.chmod(0o755)
            for part in scratch.rglob("*"):
                part.chmod(0o755 if part.is_dir() else 0o644)
                if part.is_file():
                    to_disk(part)
            os.replace(scratch, path)
        with suppress(OSError):  # not every system opens folders
            to_disk(path)
            to_disk(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder while the block runs, or until this process ends, however it ends; False if another holds it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nobody is known to have let go
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError:
        held = False
    try:
        yield held
    finally:
        os.close(handle)


def to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def require_writable(folder: Path, *names: str) -> None:
    """Raise :class:`RunFolderError` unless files with these names can be written into ``folder``, which need not be
    there yet: before long work rather than behind it.
    """
    there = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    try:
        # The one sure way to learn whether a folder can be written to; an earlier result there stays.
        with tempfile.TemporaryFile(dir=there):
            pass
        if any((folder / name).is_dir() for name in names):
            raise IsADirectoryError
    except OSError as error:
        raise RunFolderError(
            what="the output folder cannot be written", where=str(folder), fix="choose another --out"
        ) from error


def digest(value: Any, length: int = 16) -> str:
    """Return a hexadecimal digest of a JSON-like value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
