"""From a sweep's file to its cells: every combination of the axes, checked before anything is computed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from everedit.cache import digest
from everedit.data import data_set, load_edits
from everedit.engine.settings import validated
from everedit.errors import EditError, EvereditError, NotApplicable
from everedit.evaluation import FOR_ANY_DATA
from everedit.experiments.config import RunConfig, parse_setting, problems_of, put
from everedit.experiments.sweeps.config import AXES, Choice, SweepConfig, check_keys
from everedit.fitting import require_batches, require_beneath, require_fitting
from everedit.methods import method_class
from everedit.policies import make_policy

__all__ = ["Cell", "cells_of"]

_GROUPS = ("stats", "ability", "method_settings", "policy_settings")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. ``axes`` are what its entries are called; ``skipped`` says why it is not made, if so.

    The name holds a digest of everything that the cell's numbers depend on, so that a cell whose settings change is
    another cell.
    """

    name: str
    axes: dict[str, str]
    config: RunConfig
    skipped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        config = self.config.model_dump(mode="json")
        return {"name": self.name, "axes": self.axes, "config": config, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        """Return the cell that :meth:`as_dict` described."""
        return cls(values["name"], values["axes"], RunConfig.model_validate(values["config"]), values["skipped"])


@dataclass(frozen=True)
class _Source:
    """Settings, and the key of the file that they stand under."""

    key: str
    settings: dict[str, Any]

    def into(self, values: dict[str, Any]) -> None:
        """Put the settings into a run's ``values``. What groups settings, as ``stats`` does, adds to the group."""
        for path, value in self.settings.items():
            if path in _GROUPS and isinstance(value, dict):
                for name, held in value.items():
                    put(values, f"{path}.{name}", held)
            else:
                put(values, path, value)


def cells_of(sweep: SweepConfig, where: str, settings: Sequence[str] = ()) -> list[Cell]:
    """Return the cells of a sweep, in the order of its axes; ``settings`` (``key=value``) win over all of the file's.

    Combinations that a method's or a policy's traits rule out are skipped. Raises :class:`EvereditError` that names
    the file ``where`` and the key, for the first thing that no cell could be made with.
    """
    forms = _check_names(sweep, where)
    overrides = _overrides(settings)
    axes = [list(zip(sweep.called(axis), getattr(sweep, key), strict=True)) for axis, key in AXES.items()]
    found = []
    for combination in itertools.product(*axes):
        called = {axis: name for axis, (name, _) in zip(AXES, combination, strict=True)}
        entries = {axis: entry for axis, (_, entry) in zip(AXES, combination, strict=True)}
        found.append(_cell(sweep, called, entries, overrides, forms[called["data"]], where))
    if all(cell.skipped for cell in found):
        raise EditError(what=f"every cell is skipped: {found[0].skipped}", where=where, fix="change the axes or rules")
    return found


def _overrides(settings: Sequence[str]) -> dict[str, Any]:
    values = dict(map(parse_setting, settings))
    try:
        return check_keys(values)
    except ValueError as error:
        raise EditError(what=str(error), where="--set", fix="change the sweep's file") from error


def _cell(
    sweep: SweepConfig,
    called: dict[str, str],
    entries: dict[str, Any],
    overrides: dict[str, Any],
    form: str,
    where: str,
) -> Cell:
    rules = [(f"rules.{number}", rule) for number, rule in enumerate(sweep.rules) if rule.fits(called)]
    sources = [_Source("run", sweep.run)]
    for axis, key in AXES.items():
        if isinstance(entries[axis], Choice):
            number = sweep.called(axis).index(called[axis])
            sources.append(_Source(f"{key}.{number}.set", entries[axis].set))
    sources += [_Source(f"{key}.set", rule.set) for key, rule in rules]
    sources.append(_Source("--set", overrides))
    values: dict[str, Any] = {}
    for source in sources:
        source.into(values)
    values |= {axis: entries[axis].name for axis in ("model", "method", "policy", "data")}
    values |= {"data_path": entries["data"].path, "seed": entries["seed"]}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        heads = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        raise EditError(
            what=f"bad configuration: {problems_of(error)}",
            where=f"{where}, {_to_blame(sources, heads)}",
            fix=f"known keys: {', '.join(RunConfig.model_fields)}",
        ) from error
    with _naming(f"{where}, {_to_blame(sources, {'protocols'})}"):
        data_set(form).require_protocols(form, config.protocols, FOR_ANY_DATA)
    skipped = next((rule.skip for _, rule in rules if rule.skip), "") or _misfit(config, sources, where)
    # Without what is as it is by default: a key that a later version adds makes no other cell.
    about: dict[str, Any] = {"config": config.model_dump(mode="json", exclude_defaults=True), "kind": sweep.kind}
    if sweep.kind == "rollback":
        about["untouched"] = sweep.untouched
    return Cell(_folder_name(called, digest(about, 8)), called, config, skipped)


def _to_blame(sources: list[_Source], heads: set[str]) -> str:
    """Return the keys of the file under which one of the run's keys ``heads`` is set."""
    named = []
    for source in sources:
        values: dict[str, Any] = {}
        source.into(values)
        if heads & values.keys():
            named.append(source.key)
    return " and ".join(named) or "run"


def _misfit(config: RunConfig, sources: list[_Source], where: str) -> str:
    """Return why method and policy cannot work together, or nothing. Raises for settings that neither knows."""
    kind = method_class(config.method)
    with _naming(f"{where}, {_to_blame(sources, {'method_settings'})}"):
        validated(kind.Config, config.method_settings, f"method {config.method}")
    with _naming(f"{where}, {_to_blame(sources, {'policy_settings'})}"):
        policy = make_policy(config.policy, config.policy_settings)
    try:
        require_fitting(kind, policy)
        require_batches(kind, config.batch)
        if config.beneath:
            require_beneath(policy)
    except NotApplicable as error:
        return error.what
    return ""


def _check_names(sweep: SweepConfig, where: str) -> dict[str, str]:
    """Raise for a method, a policy or data that are not there, before any of them is used.

    Returns the form of each entry of data: its data set's name, or that of plain files.
    """
    for number, method in enumerate(sweep.methods):
        with _naming(f"{where}, methods.{number}"):
            method_class(method.name)
    for number, policy in enumerate(sweep.policies):
        with _naming(f"{where}, policies.{number}"):
            make_policy(policy.name, {})
    forms = {}
    for number, data in enumerate(sweep.data):
        with _naming(f"{where}, data.{number}"):
            loaded = load_edits(data.name, data.path, keep_contradictions=True)
            if not loaded.edits:
                raise EditError(what="the file holds no edit that can be used", fix="see everedit data validate")
            forms[data.called] = loaded.name
    return forms


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Add to an error from inside the block in which file and under which key its cause stands."""
    try:
        yield
    except EvereditError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise type(error)(what=error.what, where=place, fix=error.fix) from error


def _folder_name(axes: dict[str, str], identity: str) -> str:
    order = ("method", "policy", "data", "model", "seed")
    parts = [Path(axes[axis]).name if axis == "model" else axes[axis] for axis in order]
    return "-".join(re.sub(r"[^A-Za-z0-9_.+-]+", "_", part) for part in [*parts, identity])
