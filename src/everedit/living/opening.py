"""Making the folder of a living model, and opening one: every check before anything of it is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from everedit.cache import write_text
from everedit.editor import Editor
from everedit.engine.settings import validated
from everedit.errors import LedgerError
from everedit.ledger.store import Ledger
from everedit.living.config import FILE, LivingConfig
from everedit.living.times import now
from everedit.methods import method_class
from everedit.models import LanguageModel, load_model
from everedit.policies import make_policy

__all__ = ["made", "opened"]

Parts = tuple[Path, LivingConfig, Editor, Ledger]


def made(folder: Path, values: dict[str, Any], lm: LanguageModel | None, device: Any) -> Parts:
    """Make a new folder. Raises :class:`EvereditError`, and leaves nothing, if it cannot be."""
    config = validated(LivingConfig, values, "living model")
    # A misspelt name should not cost the loading of a model.
    method_class(config.method)
    make_policy(config.policy, config.policy_settings)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LedgerError(what="there is something in this place already", where=str(folder), fix="choose another")
    lm = lm or load_model(config.model, device=device, dtype=config.dtype)
    editor = config.editor(lm)
    config = config.resolved(editor, lm)
    about = {"model": lm.fingerprint, "config": config.identity, "made": now(), "pending": ""}
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger.create(folder, about)
        # Last: a folder with a config is a living model.
        write_text(folder / FILE, config.text())
    except OSError as error:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, LedgerError):
            raise
        raise LedgerError(what=f"cannot be made: {error}", where=str(folder), fix="choose another place") from error
    return folder, config, editor, ledger


def opened(folder: Path, lm: LanguageModel | None, device: Any) -> Parts:
    """Open a folder. Raises :class:`LedgerError` if it is no living model, is damaged, or is of another base model."""
    config = LivingConfig.load(folder)
    ledger = Ledger.open(folder)
    try:
        if ledger.about("config") != config.identity:
            raise LedgerError(
                what="config.yaml is not the one that this model was made with",
                where=str(folder / FILE),
                fix="restore it; only model, gates and conflicts may be changed",
            )
        lm = lm or load_model(config.model, device=device, dtype=config.dtype)
        if lm.fingerprint != ledger.about("model"):
            raise LedgerError(
                what=f"'{lm.name}' is not the base model that these edits were made on",
                where=str(folder),
                fix="name the right weights in config.yaml (model: ...)",
            )
        return folder, config, config.editor(lm), ledger
    except BaseException:
        ledger.close()
        raise
