"""Policies, one file each, found by listing this folder and imported on first use."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from everedit.engine.settings import validated
from everedit.errors import near_names
from everedit.policies._base import Policy, PolicyConfig, Preparation, Step
from everedit.policies._stack import Stack

__all__ = ["Policy", "PolicyConfig", "Preparation", "Stack", "Step", "make_policy", "policy_class", "policy_names"]


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


def make_policy(names: str, settings: dict[str, Any]) -> Stack:
    """Return the policies called ``names``, joined by ``+``, with ``settings``: of one policy as they are, of several
    by name (``{"simie": {"lam": 10}}``).

    Raises :class:`everedit.errors.UnknownName`, :class:`everedit.errors.EditError` for a bad setting, or
    :class:`everedit.errors.NotApplicable` if they do not go together.
    """
    kinds = [policy_class(name) for name in names.split("+")]
    given = settings
    if len(kinds) == 1 and kinds[0].name not in settings:
        given = {kinds[0].name: settings}
    for name in given:
        if name not in [kind.name for kind in kinds]:
            raise near_names("policy in these settings", name, [kind.name for kind in kinds])
    return Stack([kind(validated(kind.Config, given.get(kind.name, {}), f"policy {kind.name}")) for kind in kinds])
