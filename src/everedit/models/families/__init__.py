"""One small file for each model family: where it keeps its parts. Found by ``config.model_type`` alone."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from everedit.models.families._base import Family

__all__ = ["Family", "families", "family_for"]


def families() -> Iterator[Family]:
    """Yield every family that has a file in this folder."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            yield from importlib.import_module(f"{__name__}.{module.name}").FAMILIES


def family_for(model_type: str) -> Family | None:
    """Return the family of a ``config.model_type``, or None if no file names it."""
    return next((family for family in families() if model_type in family.model_types), None)
