"""Read a run folder into plain Python values, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everedit.errors import RunFolderError

Record = dict[str, Any]

_REWRITE_FIX = "restore the file from a backup, or run the edits again into a new folder"


@dataclass(frozen=True)
class RunFiles:
    """Everything a report needs from a run folder.

    ``edits`` and ``checkpoints`` are sorted by edit number and hold one record per number.
    ``summary`` is None, and ``truncated`` names the files that end in half a line, when the run was
    interrupted.
    """

    folder: Path
    config: Record
    edits: list[Record]
    checkpoints: list[Record]
    summary: Record | None
    samples: list[Record]
    quarantine: list[Record]
    truncated: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether the run wrote its summary and no file ends in half a line."""
        return self.summary is not None and not self.truncated


def load_run(run_dir: Path) -> RunFiles:
    """Return the contents of the run folder ``run_dir``.

    Only ``config.json`` is required. A last line that was cut off by an interruption is dropped and
    noted in ``truncated``.

    Raises:
        RunFolderError: the folder or ``config.json`` is missing, or a file holds something that is
            not a JSON object where one is expected.
    """
    if not run_dir.is_dir():
        raise RunFolderError(
            what="there is no run folder here",
            where=str(run_dir),
            fix="give the folder that `everedit run` wrote (the one with config.json in it)",
        )
    config = load_object(run_dir / "config.json")
    if config is None:
        raise RunFolderError(
            what="the run folder has no config.json",
            where=str(run_dir / "config.json"),
            fix="give the folder that `everedit run` wrote; without its config a run cannot be described",
        )
    truncated: list[str] = []
    metrics = run_dir / "metrics.jsonl"
    edits: dict[int, Record] = {}
    checkpoints: dict[int, Record] = {}
    for number, record in _read_lines(metrics, truncated):
        # A resumed run may repeat the step it was interrupted in; the later record is the valid one.
        # Kinds this version does not know are skipped, so that newer runs can still be read.
        if record.get("kind") == "edit":
            edits[_edit_number(record, metrics, number)] = record
        elif record.get("kind") == "checkpoint":
            checkpoints[_edit_number(record, metrics, number)] = record
    return RunFiles(
        folder=run_dir,
        config=config,
        edits=[edits[n] for n in sorted(edits)],
        checkpoints=[checkpoints[n] for n in sorted(checkpoints)],
        summary=load_object(run_dir / "summary.json"),
        samples=[record for _, record in _read_lines(run_dir / "samples.jsonl", truncated)],
        quarantine=[record for _, record in _read_lines(run_dir / "quarantine.jsonl", truncated)],
        truncated=tuple(truncated),
    )


def _read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunFolderError(
            what=f"the file cannot be read ({error.strerror})",
            where=str(path),
            fix="check the file's permissions",
        ) from error


def load_object(path: Path) -> Record | None:
    """Return the JSON object in ``path``, or None where there is no such file.

    Raises :class:`RunFolderError` if it holds anything else.
    """
    raw = _read_bytes(path)
    if raw is None:
        return None
    try:
        value = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise RunFolderError(
            what=f"the file is not valid JSON ({error.msg})",
            where=f"{path}, line {error.lineno}",
            fix=_REWRITE_FIX,
        ) from error
    except UnicodeDecodeError as error:
        raise RunFolderError(what="the file is not UTF-8 text", where=str(path), fix=_REWRITE_FIX) from error
    if not isinstance(value, dict):
        raise RunFolderError(what="the file does not hold a JSON object", where=f"{path}, line 1", fix=_REWRITE_FIX)
    return value


def _read_lines(path: Path, truncated: list[str]) -> Iterator[tuple[int, Record]]:
    """Yield (line number, object) for each line; append the file's name to ``truncated`` if cut off."""
    # Split on the newline byte only: str.splitlines would also split inside JSON strings (U+2028).
    lines = (_read_bytes(path) or b"").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
            if number == len(lines):
                truncated.append(path.name)
                return
            raise RunFolderError(
                what="the line is not valid JSON", where=f"{path}, line {number}", fix=_REWRITE_FIX
            ) from error
        if not isinstance(value, dict):
            raise RunFolderError(
                what="the line does not hold a JSON object", where=f"{path}, line {number}", fix=_REWRITE_FIX
            )
        yield number, value


def _edit_number(record: Record, path: Path, line: int) -> int:
    n = record.get("n")
    if isinstance(n, int) and not isinstance(n, bool) and n >= 1:
        return n
    raise RunFolderError(
        what=f"the record's edit number 'n' is {n!r}, not a whole number from 1",
        where=f"{path}, line {line}",
        fix=_REWRITE_FIX,
    )
