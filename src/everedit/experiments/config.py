"""The configuration of a run: one object, whether it comes from flags, a YAML file or an earlier run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from everedit.errors import EditError
from everedit.evaluation import GENERAL, JudgeConfig
from everedit.evaluation.ability import AbilityConfig

__all__ = ["RunConfig", "StatsConfig", "apply_settings", "parse_setting", "problems_of", "put", "read_yaml"]


class StatsConfig(BaseModel):
    """The text that second moments are gathered over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: Path | None = Field(None, description="text or JSONL file; without one, text sampled from the model")
    tokens: int = Field(8_192, ge=1, description="how many tokens to read")
    window_tokens: int = Field(512, ge=8, description="length of a window, in tokens")
    imported: str | None = Field(None, description="name given to imported statistics: everedit stats import")


class RunConfig(BaseModel):
    """Everything that a run depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "smollm2-135m"
    method: str = "memit"
    policy: str = "accumulate"
    data: str = "worldfacts"
    data_path: Path | None = None
    edits: int = Field(50, ge=1, description="how many edits; records that are set aside are made up for")
    batch: int = Field(1, ge=1, description="how many edits are made at once, by methods that solve batches")
    checkpoints: tuple[int, ...] = Field((1, 10, 50), description="after how many edits all of them are scored")
    seed: int = 0
    shuffle: bool = Field(False, description="draw the order of the records with the seed: another stream for each")
    single: bool = Field(False, description="take every edit back before the next one: single edits, no stream")
    device: str | None = None
    dtype: str | None = None
    method_settings: dict[str, Any] = {}
    policy_settings: dict[str, Any] = {}
    stats: StatsConfig = Field(default_factory=lambda: StatsConfig.model_validate({}))
    protocols: tuple[str, ...] = GENERAL
    immediate: tuple[str, ...] | None = Field(
        None, description="those of the protocols that an edit is scored under right after it is made; null: all"
    )
    beneath: bool = Field(
        False, description="score the stream beneath a policy of read-out too, which goes on without it: a second row"
    )
    judge: JudgeConfig | None = Field(None, description="who judges free answers under wild/judged@1")
    references: Path | None = Field(None, description="reference texts for the consistency of rome/generation@1")
    ability: AbilityConfig | None = Field(None, description="tasks measured before the first edit and at checkpoints")
    known: Literal["quarantine", "keep"] = Field("quarantine", description="edits whose target the model says already")
    contradictions: Literal["quarantine", "keep"] = "quarantine"

    @model_validator(mode="after")
    def _end_is_a_checkpoint(self) -> RunConfig:
        # What is taken back at once cannot be forgotten: only the end of single edits has a meaning.
        marks = set() if self.single else {mark for mark in self.checkpoints if 0 < mark < self.edits}
        object.__setattr__(self, "checkpoints", (*sorted(marks), self.edits))
        return self

    @model_validator(mode="after")
    def _immediate_is_of_the_protocols(self) -> RunConfig:
        if self.immediate is not None:
            other = [name for name in self.immediate if name not in self.protocols]
            if other:
                raise ValueError(f"immediate: {', '.join(other)} is none of the run's protocols")
            if self.single:
                raise ValueError("immediate: single edits have no other scores; leave it out, or choose protocols")
        return self

    @property
    def right_after(self) -> tuple[str, ...]:
        """The protocols that an edit is scored under right after it is made."""
        return self.protocols if self.immediate is None else self.immediate

    @classmethod
    def build(cls, file: Path | None, flags: dict[str, Any], settings: list[str]) -> RunConfig:
        """Return the config of a YAML ``file``, overridden by ``flags`` that are not None, then by ``settings``.

        Raises :class:`EditError` that names the bad key.
        """
        values: dict[str, Any] = {}
        if file is not None:
            values = read_yaml(file)
        values.update({key: value for key, value in flags.items() if value is not None})
        apply_settings(values, settings)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            known = ", ".join(cls.model_fields)
            what = f"bad configuration: {problems_of(error)}"
            raise EditError(what=what, where=str(file or ""), fix=f"known keys: {known}") from error


def problems_of(error: ValidationError) -> str:
    """Return every problem of a validation on one line, each behind the key that it is about."""
    keys = (".".join(map(str, item["loc"])) for item in error.errors())
    said = (item["msg"].removeprefix("Value error, ") for item in error.errors())
    return "; ".join(f"{key}: {text}" if key else text for key, text in zip(keys, said, strict=True))


class _Strict(yaml.SafeLoader):
    """YAML in which a key that stands twice in one mapping is an error, and not silently the second one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises :class:`EditError` that names the file if it holds none."""
    try:
        # The loader is safe_load's own, made stricter.
        values = yaml.load(file.read_text(encoding="utf-8"), _Strict) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = f"cannot read the configuration: {error}"
        raise EditError(what=what, where=str(file), fix="give a YAML file") from error
    if not isinstance(values, dict):
        raise EditError(what="a configuration is a mapping of keys", where=str(file), fix="write key: value lines")
    return values


def apply_settings(values: dict[str, Any], settings: list[str]) -> None:
    """Put ``key=value`` settings into nested ``values``: ``method.…``, ``policy.…``, ``stats.…`` or a top-level key.

    Values are read as YAML, so ``[1, 2]``, ``true`` and ``1e-3`` mean what they look like.
    """
    for setting in settings:
        put(values, *parse_setting(setting))


def parse_setting(setting: str) -> tuple[str, Any]:
    """Return the dotted path and the value of a ``key=value``. Raises :class:`EditError` if it is none."""
    path, equals, text = setting.partition("=")
    if not equals or not path:
        what = f"'{setting}' is not of the form key=value"
        raise EditError(what=what, where="--set", fix="for example --set policy.lam=10")
    return path, yaml.safe_load(text)


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Put ``value`` at a dotted ``path`` of nested ``values``; no mapping that was in there before is changed."""
    head, *rest = path.split(".")
    keys = [f"{head}_settings" if head in ("method", "policy") and rest else head, *rest]
    target = values
    for key in keys[:-1]:
        held = target.get(key)
        target[key] = dict(held) if isinstance(held, dict) else {}
        target = target[key]
    target[keys[-1]] = _number(value)


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as a string.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
