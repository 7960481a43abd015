"""What a run writes down: all that it depends on, and a row for each edit."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from typing import Any

import torch
import transformers

from everedit._version import __version__
from everedit.cache import file_sha256
from everedit.data import Loaded
from everedit.edit import Edit
from everedit.editor import Commit, Editor
from everedit.evaluation import PROTOCOLS
from everedit.experiments.config import RunConfig
from everedit.models.memory import resident_mb

__all__ = ["described", "edit_row"]


def described(config: RunConfig, editor: Editor, loaded: Loaded, edits: int, command: str) -> dict[str, Any]:
    """Return all that a run of ``edits`` edits depends on, for ``config.json``."""
    lm, method, policy = editor.lm, editor.method, editor.policy
    under = policy.beneath()
    beneath = {"policy": under.name or "accumulate", "policy_settings": under.settings}
    return {
        "model": {
            "name": config.model,
            "family": lm.layout.family.name,
            "parameters": lm.parameters,
            "fingerprint": lm.fingerprint,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": str(lm.device),
        },
        "method": method.name,
        "policy": policy.name,
        **({"beneath": beneath} if config.beneath else {}),
        "data": {"name": loaded.name, "path": str(loaded.path), "sha256": file_sha256(loaded.path)},
        "edits": edits,
        "checkpoints": list(config.checkpoints),
        "seed": config.seed,
        "settings": {
            "method": method.config.model_dump(mode="json"),
            "policy": policy.settings,
        },
        "statistics": editor.bench.moments.provenance["corpus"],
        "protocols": list(config.protocols),
        "explanations": {name: PROTOCOLS[name].explanation for name in config.protocols},
        "versions": {
            "everedit": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "command": command,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": config.model_dump(mode="json"),
    }


def edit_row(
    n: int, edit: Edit, commit: Commit, before: dict[str, Any], immediate: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    """Return the row of the ``n``-th edit, made by ``commit``, with its scores before it and right after it."""
    return {
        "kind": "edit",
        "n": n,
        "edit_id": edit.id,
        "prompt": edit.prompt,
        "subject": edit.subject,
        "target_new": edit.target_new,
        "ground_truth": edit.ground_truth,
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
        "update_norm": commit.norm,
        "target_probability": commit.target_probability,
        "memory_mb": resident_mb(),
        "before": before,
        "immediate": immediate,
    }
