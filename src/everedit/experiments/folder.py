"""The run folder: what is written when, and how an interrupted run is read back."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everedit.cache import atomic_write, require_writable, write_json
from everedit.editor import StreamState
from everedit.engine.state import State
from everedit.engine.weights import Snapshot
from everedit.errors import RunFolderError
from everedit.ledger.stream import pack, unpack
from everedit.patch import load_tensors, save_tensors

__all__ = ["RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """A folder that explains itself: config, a row for each edit and checkpoint, samples, summary, report."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Return a new run folder, which is made with the first file in it.

        Raises :class:`RunFolderError` if it holds a run or cannot be written.
        """
        if (path / "config.json").exists():
            raise RunFolderError(
                what="this folder holds a run already",
                where=str(path),
                fix=f"go on with it (everedit run --resume --out {path}) or choose another --out",
            )
        require_writable(path, "config.json", "metrics.jsonl")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run folder. Raises :class:`RunFolderError` if there is none."""
        if not (path / "config.json").exists():
            raise RunFolderError(what="there is no run to resume", where=str(path), fix="start it without --resume")
        return cls(path)

    def read_json(self, name: str) -> Any:
        """Return a JSON file's value. Raises :class:`RunFolderError` if it is missing or damaged."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                what=f"cannot read the file: {error}", where=str(self.path / name), fix="start the run anew"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically."""
        write_json(self.path / name, value)

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a JSONL file atomically."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(self.path / name, lambda scratch: scratch.write_text(lines, encoding="utf-8"))

    def append(self, row: dict[str, Any], name: str = "metrics.jsonl") -> None:
        """Add a row to a JSONL file."""
        with (self.path / name).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the whole rows of a JSONL file; a last line cut off by an interruption does not count."""
        rows = []
        for line in (self.path / name).read_text(encoding="utf-8").split("\n"):
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def save_state(self, state: StreamState, edits: int) -> None:
        """Write the stream's state after ``edits`` edits, atomically."""
        tensors, info = pack(state)
        save_tensors(self.path / "state.safetensors", tensors, {**info, "edits": edits})

    def load_state(self, device: torch.device) -> tuple[StreamState, int]:
        """Return the saved state and after how many edits it was; (empty, 0) if none was saved."""
        file = self.path / "state.safetensors"
        if not file.exists():
            return StreamState(Snapshot({}), State(), State(), {}), 0
        tensors, info = load_tensors(file)
        return unpack(tensors, info, device), int(info["edits"])
