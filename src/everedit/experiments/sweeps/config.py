"""The file of a sweep: axes whose every combination is a cell, what entries set, and rules for combinations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from everedit.errors import EditError
from everedit.experiments.config import RunConfig, problems_of, read_yaml

__all__ = ["AXES", "Choice", "DataChoice", "Rule", "SweepConfig", "check_keys"]

AXES = {"model": "models", "data": "data", "method": "methods", "policy": "policies", "seed": "seeds"}
"""Each axis of a cell, and the key of a sweep's file that lists its values."""

_OF_THE_AXES = {**AXES, "data_path": "data"}


def check_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Return ``settings``. Raises :class:`ValueError` for a key that a run does not have, or that is an axis."""
    for key in settings:
        if key in _OF_THE_AXES:
            raise ValueError(f"'{key}' is an axis: list it under '{_OF_THE_AXES[key]}'")
        if str(key).partition(".")[0] not in RunConfig.model_fields:
            raise ValueError(f"'{key}' is no key of a run; known keys: {', '.join(RunConfig.model_fields)}")
    return settings


Settings = Annotated[dict[str, Any], AfterValidator(check_keys)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Choice(_Strict):
    """An entry of an axis: the name, what it is called in tables, and settings in the form of ``--set``."""

    name: str = Field(min_length=1)
    label: str = ""
    set: Settings = {}

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def called(self) -> str:
        """What tables and rules call it."""
        return self.label or self.name


class DataChoice(Choice):
    """A data set, and its file where it does not ship with Everedit."""

    path: Path | None = None

    @property
    def called(self) -> str:
        """What tables and rules call it: of a file of edits, its name without the folder and the ending."""
        return self.label or (Path(self.name).stem if Path(self.name).suffix else self.name)


class Rule(_Strict):
    """What holds for every cell that ``when`` fits: settings, or the reason why the cell is not made."""

    when: dict[Literal["model", "data", "method", "policy", "seed"], tuple[str, ...]] = Field(min_length=1)
    set: Settings = {}
    skip: str = ""

    @field_validator("when", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {axis: [str(item) for item in _listed(wanted)] for axis, wanted in value.items()}

    def fits(self, axes: Mapping[str, str]) -> bool:
        """Whether a cell with these entries, by axis, is meant."""
        return all(axes[axis] in wanted for axis, wanted in self.when.items())


class SweepConfig(_Strict):
    """A grid of runs. ``run`` holds what all of them share, with the keys of a run's configuration."""

    title: str = ""
    kind: Literal["run", "rollback"] = Field("run", description="streams of edits, or WilKE's roll-back protocol")
    untouched: int = Field(50, ge=0, description="facts that a roll-back only asks for")
    run: Settings = {}
    models: tuple[Choice, ...] = Field((Choice(name="smollm2-135m"),), min_length=1)
    data: tuple[DataChoice, ...] = Field((DataChoice(name="worldfacts"),), min_length=1)
    methods: tuple[Choice, ...] = Field((Choice(name="memit"),), min_length=1)
    policies: tuple[Choice, ...] = Field((Choice(name="accumulate"),), min_length=1)
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    rules: tuple[Rule, ...] = ()

    @field_validator("models", "data", "methods", "policies", "seeds", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: Any) -> Any:
        return _listed(value)

    @field_validator("models", "data", "methods", "policies", "seeds")
    @classmethod
    def _told_apart(cls, value: tuple[Choice | int, ...]) -> tuple[Choice | int, ...]:
        names = [choice.called if isinstance(choice, Choice) else str(choice) for choice in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two entries are called {' and '.join(twice)}: give each a label of its own")
        return value

    @model_validator(mode="after")
    def _rules_name_entries(self) -> SweepConfig:
        known = {axis: self.called(axis) for axis in AXES}
        for number, rule in enumerate(self.rules):
            for axis, wanted in rule.when.items():
                for name in wanted:
                    if name not in known[axis]:
                        raise ValueError(f"rules.{number}.when.{axis}: no entry is called {name}")
        return self

    def called(self, axis: str) -> list[str]:
        """Return what the entries of an axis are called, in their order."""
        entries = getattr(self, AXES[axis])
        return [entry.called if isinstance(entry, Choice) else str(entry) for entry in entries]

    @classmethod
    def read(cls, file: Path) -> SweepConfig:
        """Return the sweep in a YAML file. Raises :class:`EditError` that names the file and the key."""
        return cls.parse(read_yaml(file), str(file))

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> SweepConfig:
        """Return the sweep in ``values``. Raises :class:`EditError` that names ``where`` and the key."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise EditError(
                what=f"bad sweep: {problems_of(error)}", where=where, fix=f"known keys: {', '.join(cls.model_fields)}"
            ) from error


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]
