"""Hyper-parameters as EasyEdit's, ROME's and MEMIT's code has them: read from their files, turned into our settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml
from typing_extensions import Self

from everedit.compat.rules import Algorithm, Translation, translate, warn_unknown
from everedit.engine.settings import validated
from everedit.errors import EditError
from everedit.experiments.config import RunConfig
from everedit.training import TrainConfig

__all__ = ["SUFFIXES", "HyperParams", "merged", "read_file"]

SUFFIXES = (".yaml", ".yml", ".json")
"""Of files of hyper-parameters, in the order in which they are looked for."""


class HyperParams:
    """One algorithm's hyper-parameters, as attributes under the names that other code gives them.

    They may be set and changed like those of EasyEdit's classes; an unknown name gets a warning with the nearest known
    one. :attr:`ignored` lists those that change nothing here, and why.
    """

    algorithm: ClassVar[Algorithm]

    def __init__(self, **values: Any) -> None:
        self._file = ""
        self._take(values)

    def __setattr__(self, key: str, value: Any) -> None:
        if not key.startswith("_") and key not in self.algorithm.table:
            warn_unknown("hyper-parameter", key, self.algorithm.table, self.algorithm.name)
        super().__setattr__(key, value)

    def _take(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key not in self.algorithm.table:
                where = self._file or self.algorithm.name
                warn_unknown("hyper-parameter", key, self.algorithm.table, where, depth=4)
            super().__setattr__(key, value)

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> Self:
        """Read a YAML or JSON file, given with or without its extension.

        Raises :class:`EditError` if it is missing, cannot be parsed, or is another algorithm's.
        """
        file, values = read_file(Path(hparams_name_or_path))
        named = values.get("alg_name", values.get("alg"))
        if named is not None and not cls.algorithm.is_called(str(named)):
            from everedit.compat.classes import hparams_class

            raise EditError(
                what=f"the file is for {named}, and {cls.__name__} reads those for {cls.algorithm.name}",
                where=str(file),
                fix=f"read it with {hparams_class(str(named)).__name__}.from_hparams",
            )
        found = cls.__new__(cls)
        found._file = str(file)
        found._take(values)
        return found

    from_json = from_hparams
    """As ROME's and MEMIT's code calls it."""

    def to_dict(self) -> dict[str, Any]:
        """Return all hyper-parameters as they are."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def translation(self) -> Translation:
        """Return what the hyper-parameters mean here.

        Raises :class:`EditError` that names the one whose value will not do.
        """
        found = translate(self.algorithm, self.to_dict(), self._file or type(self).__name__)
        checkpoint = found.settings.get("method.checkpoint")
        if checkpoint is None:
            return found
        # Networks are what they were trained as: settings read from a second place could only contradict.
        settings = {place: value for place, value in found.settings.items() if not place.startswith("method.")}
        rules = self.algorithm.table
        trained = {
            key: "the checkpoint says what it was trained with"
            for key in self.to_dict()
            if key != "archive" and any(place.startswith("method.") for place in getattr(rules.get(key), "places", ()))
        }
        return Translation(found.method, {**settings, "method.checkpoint": checkpoint}, {**found.ignored, **trained})

    @property
    def ignored(self) -> dict[str, str]:
        """The hyper-parameters that change nothing here, and why."""
        return self.translation().ignored

    def run_config(self) -> RunConfig:
        """Return the config of ours that says the same; settings under ``everedit`` win.

        Raises :class:`EditError` that names what will not do.
        """
        found = self.translation()
        values: dict[str, Any] = {
            place: found.settings[place] for place in ("model", "batch", "seed", "dtype") if place in found.settings
        }
        values |= {"method": found.method, "method_settings": found.under("method")}
        return RunConfig.build(None, merged(values, self.own()), [])

    def train_config(self, data: Path, validation: Path | None) -> TrainConfig:
        """Return the config of a training on files of edits.

        Raises :class:`EditError` that names what will not do.
        """
        found = self.translation()
        if not isinstance(self.to_dict().get("model_name"), str):
            raise EditError(
                what="a training loads its model itself",
                where="model_name",
                fix="set model_name to an alias (everedit models ls), a folder or a hub id",
            )
        values: dict[str, Any] = {place: found.settings.get(place) for place in ("model", "dtype")}
        values |= {"method": found.method, "method_settings": found.under("method"), "data": str(data)}
        values |= {} if validation is None else {"validation": str(validation)}
        own = merged({**values, **found.under("train")}, self.own())
        return validated(TrainConfig, own, f"hyper-parameters of {self.algorithm.name}")

    def own(self) -> dict[str, Any]:
        """Return the settings under ``everedit``, which are ours already."""
        own = self.to_dict().get("everedit", {})
        if not isinstance(own, dict):
            raise EditError(
                what="everedit is no mapping of settings",
                where=type(self).__name__,
                fix="for example everedit: {method_settings: {contexts: [[5, 10]]}, stats: {corpus: text.txt}}",
            )
        return own

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in self.to_dict().items())})"


def read_file(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return a file of hyper-parameters, found with or without its extension, and what it holds.

    Raises :class:`EditError` if it is missing, cannot be parsed or is no mapping.
    """
    named = [path] if path.suffix in SUFFIXES else [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    file = next((candidate for candidate in named if candidate.is_file()), None)
    if file is None:
        raise EditError(
            what="there is no such file of hyper-parameters",
            where=str(path),
            fix=f"give the path of a YAML or JSON file{_others(path.parent)}",
        )
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise EditError(
            what=f"the file of hyper-parameters cannot be read: {error}", where=str(file), fix="correct the file"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise EditError(
            what="a file of hyper-parameters is a mapping of names to values",
            where=str(file),
            fix="write lines such as v_lr: 0.5",
        )
    return file, values


def _others(folder: Path) -> str:
    names = sorted(file.name for file in folder.glob("*") if file.suffix in SUFFIXES) if folder.is_dir() else []
    return f"; in its folder are {', '.join(names[:8])}" if names else ""


def merged(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``own`` on top, mappings in mappings key by key."""
    both = dict(values)
    for key, value in own.items():
        nested = isinstance(value, Mapping) and isinstance(both.get(key), Mapping)
        both[key] = merged(both[key], value) if nested else value
    return both
