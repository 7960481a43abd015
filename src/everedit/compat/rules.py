"""How hyper-parameters of other code become ours: a table of rules for each algorithm, and what applies it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from everedit.errors import EditError

__all__ = [
    "Algorithm",
    "CompatibilityWarning",
    "Ignored",
    "Mapped",
    "Table",
    "Translation",
    "translate",
    "warn_unknown",
]


class CompatibilityWarning(UserWarning):
    """Something that other code asks for is not read here."""


@dataclass(frozen=True)
class Mapped:
    """A key that says what a setting of ours says.

    ``to`` is the setting's place, or several: ``model``, ``batch`` and the like, or ``method.…``, ``policy.…`` and
    ``train.…``. ``read`` turns a value into ours; it takes the value of the key ``beside`` as well if one is named,
    gives None to leave our setting as it is, and raises ``ValueError`` that says what is needed instead.
    """

    to: str | tuple[str, ...]
    read: Callable[..., Any]
    beside: str | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """The settings that it gives."""
        return (self.to,) if isinstance(self.to, str) else self.to


@dataclass(frozen=True)
class Ignored:
    """A key that changes nothing here, and why; with ``only``, any other value would, and is an error."""

    why: str
    only: tuple[Any, ...] = ()


Table = Mapping[str, Mapped | Ignored]


@dataclass(frozen=True)
class Algorithm:
    """An algorithm under the name that other code gives it (``alg_name``) and some may spell otherwise.

    ``method`` is ours, or depends on the hyper-parameters; ``always`` are settings that make it what that code does
    without having a key for it.
    """

    name: str
    method: str | Callable[[Mapping[str, Any]], str]
    table: Table
    always: Mapping[str, Any] = field(default_factory=dict)
    spellings: tuple[str, ...] = ()

    def is_called(self, name: str) -> bool:
        """Whether ``name`` is the algorithm's, in any case."""
        return name.casefold() in (spelling.casefold() for spelling in (self.name, *self.spellings))


@dataclass(frozen=True)
class Translation:
    """What became of hyper-parameters: our method, our settings by place, and the keys that change nothing, and why."""

    method: str
    settings: dict[str, Any]
    ignored: dict[str, str]

    def under(self, head: str) -> dict[str, Any]:
        """Return the settings of ``method``, ``policy`` or ``train``, nested as ours are."""
        found: dict[str, Any] = {}
        for place, value in self.settings.items():
            first, *path = place.split(".")
            if first == head and path:
                inner = found
                for part in path[:-1]:
                    inner = inner.setdefault(part, {})
                inner[path[-1]] = value
        return found


def translate(algorithm: Algorithm, values: Mapping[str, Any], where: str) -> Translation:
    """Return what hyper-parameters mean here. Raises :class:`EditError` that names the key whose value will not do."""
    settings, ignored = dict(algorithm.always), {}
    for key, value in values.items():
        rule = algorithm.table.get(key)
        if rule is None:
            ignored[key] = "the key is not known"
        elif isinstance(rule, Ignored):
            if rule.only and value not in rule.only:
                allowed = " or ".join(map(repr, rule.only))
                raise EditError(
                    what=f"{key} is {value!r}, and here it can only be {allowed}: {rule.why}",
                    where=where,
                    fix=f"set {key} to {allowed}, or leave it out",
                )
            ignored[key] = rule.why
        else:
            found = _read(rule, key, values, where)
            settings.update({place: found for place in rule.places if found is not None})
    method = algorithm.method if isinstance(algorithm.method, str) else algorithm.method(values)
    return Translation(method, settings, ignored)


def _read(rule: Mapped, key: str, values: Mapping[str, Any], where: str) -> Any:
    given = (values[key],) if rule.beside is None else (values[key], values.get(rule.beside))
    try:
        return rule.read(*given)
    except ValueError as error:
        raise EditError(what=f"{key} is {values[key]!r}", where=where, fix=f"give {error}") from error


def warn_unknown(kind: str, name: str, known: Collection[str], where: str = "", depth: int = 3) -> None:
    """Warn that a name is not known, with the nearest one that is; ``depth`` leads to the caller's caller."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    place = f" ({where})" if where else ""
    hint = f"did you mean {near[0]}?" if near else "it changes nothing"
    warnings.warn(f"unknown {kind} '{name}'{place}: {hint}", CompatibilityWarning, stacklevel=depth)
