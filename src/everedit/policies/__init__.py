"""Policies, one file each, found by listing this folder and imported on first use."""

from __future__ import annotations

import importlib
import pkgutil

from everedit.errors import near_names
from everedit.policies._base import Policy, PolicyConfig, Step

__all__ = ["Policy", "PolicyConfig", "Step", "policy_class", "policy_names"]


def policy_names() -> list[str]:
    """Return the names of all policies; a file's name with ``_`` as ``-``. Imports none of them."""
    return sorted(
        module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
    )


def policy_class(name: str) -> type[Policy]:
    """Return the policy called ``name``. Raises :class:`everedit.errors.UnknownName` with near names."""
    if name.lower() not in policy_names():
        raise near_names("policy", name, policy_names())
    module = importlib.import_module(f"{__name__}.{name.lower().replace('-', '_')}")
    found: type[Policy] = module.POLICY
    return found
