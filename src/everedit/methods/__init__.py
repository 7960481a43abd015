"""Editing methods, one file each, found by listing this folder and imported on first use."""

from __future__ import annotations

import importlib
import pkgutil

from everedit.errors import near_names
from everedit.methods._base import Method, MethodConfig, Traits

__all__ = ["Method", "MethodConfig", "Traits", "method_class", "method_names"]


def method_names() -> list[str]:
    """Return the names of all methods; a file's name with ``_`` as ``-``. Imports none of them."""
    return sorted(
        module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
    )


def method_class(name: str) -> type[Method]:
    """Return the method called ``name``. Raises :class:`everedit.errors.UnknownName` with near names."""
    if name.lower() not in method_names():
        raise near_names("method", name, method_names())
    module = importlib.import_module(f"{__name__}.{name.lower().replace('-', '_')}")
    found: type[Method] = module.METHOD
    return found
