"""The unedited model's answers, kept in a folder: runs that ask the same of it need not ask again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from everedit._version import __version__
from everedit.cache import digest, write_json
from everedit.edit import Edit
from everedit.errors import CacheError
from everedit.evaluation import Baseline, Evaluator
from everedit.experiments.config import RunConfig
from everedit.report.sweep_files import read_if_there

__all__ = ["KeptAnswers"]


@dataclass
class KeptAnswers:
    """Asks what ``evaluator`` asks under ``config``, and keeps the answers in ``folder``, if there is one.

    A file is named by all that answers depend on, down to the number of threads, which decides how sums round: a run
    has the same bits with and without it.
    """

    folder: Path | None
    evaluator: Evaluator
    config: RunConfig

    def baseline(self, edits: Sequence[Edit]) -> Baseline:
        """Return the unedited model's answers to some edits."""
        if self.folder is None:
            return self.evaluator.baseline(edits)
        file = self.folder / f"{self._digest(edits)}.json"
        try:
            return Baseline.from_json(read_if_there(file))
        except CacheError:
            # Not there, or not whole: it is only a copy of what can be asked for.
            found = self.evaluator.baseline(edits)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, found.as_json())
        return found

    def _digest(self, edits: Sequence[Edit]) -> str:
        lm, config = self.evaluator.lm, self.config
        return digest({
            "model": lm.fingerprint, "dtype": str(lm.dtype), "device": str(lm.device),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "everedit": __version__,
            "asked": config.model_dump(mode="json", include={"protocols", "judge", "seed"}),
            "edits": [edit.model_dump(mode="json", exclude_defaults=True) for edit in edits],
        })  # fmt: skip
