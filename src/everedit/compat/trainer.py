"""EasyEdit's ``EditTrainer`` on our training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from everedit.compat.datasets import as_file, edits_of
from everedit.compat.hparams import HyperParams
from everedit.errors import EditError
from everedit.training import TrainConfig, resume, train
from everedit.training.folder import TrainFolder

__all__ = ["EditTrainer"]


class EditTrainer:
    """Trains the networks of MEND, MALMEN, KE or SERAC on a data set.

    The checkpoint is the folder ``results_dir``/models/ALGORITHM/MODEL, which the ``archive`` of the hyper-parameters
    for editing names. ``val_set`` is validated on; without one the last records of ``train_set`` are, untrained on.
    """

    def __init__(self, config: HyperParams, train_set: Iterable[Any], val_set: Iterable[Any] | None = None) -> None:
        self.hparams = config
        validation = None if val_set is None else as_file(edits_of(val_set, "val_set"))
        self.config: TrainConfig = config.train_config(as_file(edits_of(train_set, "train_set")), validation).resolved()

    @property
    def folder(self) -> Path:
        """Where the checkpoint is written."""
        results = self.hparams.translation().settings.get("results", "./results")
        return Path(results) / "models" / self.hparams.algorithm.name / Path(self.config.model).name

    def run(self) -> dict[str, Any]:
        """Train, or go on with a training of the same config that was interrupted; return the checkpoint's card.

        Raises :class:`EditError` if the folder holds another training.
        """
        if not (self.folder / "config.json").exists():
            return train(self.config, self.folder)
        begun = TrainFolder.open(self.folder).config()["training"]
        if begun != self.config.model_dump(mode="json"):
            raise EditError(
                what="results_dir holds another training of this method and model",
                where=str(self.folder),
                fix="give another results_dir, or delete that folder",
            )
        return resume(self.folder)
