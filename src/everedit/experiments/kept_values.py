"""Values found on the unedited model, kept in a folder: a run under another policy need not find them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from everedit._version import __version__
from everedit.cache import digest
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.target import Target
from everedit.errors import CacheError
from everedit.ledger.stream import pack_targets, unpack_targets
from everedit.patch import load_tensors, save_tensors

__all__ = ["KeptValues"]


@dataclass
class KeptValues:
    """Finds what ``editor``'s method wants of the unedited model, and keeps it in ``folder``.

    A file holds edits that were optimised together, and is named by all that their values depend on, down to the
    number of threads: a run has the same bits with and without it. What finding them took is kept with them and
    counted again, so that what an edit costs is told alike.
    """

    folder: Path
    editor: Editor

    def find(self, edits: Sequence[Edit]) -> list[Target]:
        """Return the values of some edits on the model as it is, which must be the unedited one."""
        file, clock = self.folder / f"{self._digest(edits)}.safetensors", self.editor.bench.clock
        if (kept := self._read(file)) is not None:
            found, seconds = kept
            clock.add(seconds)
            return [found[edit.id] for edit in edits]
        before = dict(clock.seconds)
        targets = self.editor.method.targets(self.editor.bench, edits)
        if targets:
            seconds = {phase: spent - before.get(phase, 0.0) for phase, spent in clock.seconds.items()}
            tensors, values = pack_targets(dict(zip((edit.id for edit in edits), targets, strict=True)))
            save_tensors(file, tensors, {"values": values, "seconds": seconds})
        return targets

    def _read(self, file: Path) -> tuple[dict[str, Target], dict[str, float]] | None:
        """Return a file's values by edit, and what they took; None if it is not there or not whole: it is only a copy
        of what can be found again.
        """
        try:
            tensors, info = load_tensors(file)
            return unpack_targets(tensors, info["values"], self.editor.lm.device), info["seconds"]
        except (CacheError, KeyError):
            return None

    def _digest(self, edits: Sequence[Edit]) -> str:
        bench = self.editor.bench
        lm, known = bench.lm, bench.moments.provenance
        return digest({
            "model": known["model"], "tokenizer": known["tokenizer"], "dtype": known["dtype"],
            "device": str(lm.device), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "everedit": __version__,
            "found": self.editor.method.values_depend_on(bench), "edits": [edit.id for edit in edits],
        })  # fmt: skip
