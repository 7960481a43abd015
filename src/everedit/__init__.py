"""Everedit: lifelong model editing.

The public names are loaded when they are first used, so that ``import everedit`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from everedit._version import __version__

if TYPE_CHECKING:
    from everedit.data import load_edits
    from everedit.edit import Edit, Probe
    from everedit.editor import Answer, Editor, EditResult
    from everedit.engine.moments import Corpus
    from everedit.errors import EvereditError
    from everedit.evaluation import Evaluator
    from everedit.living import LivingModel
    from everedit.models import LanguageModel, load_model
    from everedit.patch import Patch

__all__ = [
    "Answer",
    "Corpus",
    "Edit",
    "EditResult",
    "Editor",
    "Evaluator",
    "EvereditError",
    "LanguageModel",
    "LivingModel",
    "Patch",
    "Probe",
    "__version__",
    "load_edits",
    "load_model",
]

_HOMES = {
    "Answer": "editor", "Corpus": "engine.moments", "Edit": "edit", "EditResult": "editor", "Editor": "editor",
    "Evaluator": "evaluation", "EvereditError": "errors", "LanguageModel": "models",
    "LivingModel": "living", "Patch": "patch", "Probe": "edit",
    "load_edits": "data", "load_model": "models",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'everedit' has no attribute '{name}'")
    return getattr(import_module(f"everedit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
