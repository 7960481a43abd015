"""Checkpoints of the methods that are trained first, for tiny models: trained on the very edits that tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.methods._trained import TrainedMethod
from everedit.models import LanguageModel
from everedit.training.folder import TrainFolder

TRAINED: dict[str, dict[str, Any]] = {
    "mend": {"rank": 32, "lr": 1e-3, "step_lr": 1e-2, "step": 1e-3, "c_edit": 1.0, "c_loc": 0.3},
    "malmen": {"rank": 32, "lr": 1e-3, "step_lr": 1e-2, "step": 1e-3, "c_edit": 1.0, "c_loc": 0.3},
    "ke": {"hidden": 32, "condition": 64, "lstm": 32, "lr": 1e-2, "objective": "weighted", "c_edit": 1.0, "c_loc": 0.1},
    "serac": {"lr": 3e-3, "c_edit": 1.0, "train_encoder": False},
}
"""Settings of the networks that learn two edits of a tiny model in seconds."""


def checkpoint(lm: LanguageModel, method: str, edits: list[Edit], folder: Path, steps: int = 150) -> Path:
    """Train a method's networks on ``edits``, each by itself, until they make all of them; return the checkpoint."""
    editor = Editor(lm, method, method_settings=TRAINED[method])
    assert isinstance(editor.method, TrainedMethod)
    learner = editor.method.learner(editor.bench)
    optimiser = learner.optimiser()
    for step in range(steps):
        learner.train()
        loss, _ = learner([edits[step % len(edits)]])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        learner.after_step()
        if step % 10 == 9:
            learner.eval()
            with torch.no_grad():
                found = [learner([edit])[1] for edit in edits]
            if all(figures["nll"] < 0.15 and figures["reliability"] == 1 for figures in found):
                break
    card = {"method": method, "model": lm.fingerprint, "settings": editor.method.config.model_dump(mode="json")}
    TrainFolder.create(folder).save_best(learner, card)
    return folder
