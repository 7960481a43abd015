"""``config.yaml`` of a living model: what it is made of, which never changes, and its gates, which may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from everedit.cache import digest
from everedit.conflicts import ConflictsConfig
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.engine.settings import validated
from everedit.errors import EditError, LedgerError
from everedit.experiments import StatsConfig
from everedit.gates import GatesConfig
from everedit.models import LanguageModel

__all__ = ["LivingConfig"]

FILE = "config.yaml"
_MAY_CHANGE = {"gates", "conflicts", "model"}


class LivingConfig(BaseModel):
    """What a living model is made of. All but ``gates`` and ``conflicts`` is fixed when it is made; ``model`` may name
    the same weights elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = "smollm2-135m"
    dtype: str | None = None
    method: str = "memit"
    policy: str = "accumulate"
    seed: int = 0
    method_settings: dict[str, Any] = {}
    policy_settings: dict[str, Any] = {}
    stats: StatsConfig = Field(default_factory=lambda: StatsConfig.model_validate({}))
    gates: GatesConfig = Field(default_factory=lambda: GatesConfig.model_validate({}))
    _written: dict[str, Any] | None = PrivateAttr(None)
    conflicts: ConflictsConfig = Field(default_factory=lambda: ConflictsConfig.model_validate({}))

    @classmethod
    def load(cls, folder: Path) -> LivingConfig:
        """Return the config of a folder. Raises :class:`LedgerError` if there is none that can be used."""
        file = folder / FILE
        if not file.is_file():
            raise LedgerError(
                what="there is no living model here", where=str(folder), fix=f"make one: everedit init {folder.name}"
            )
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise LedgerError(what=f"cannot be read: {error}", where=str(file), fix="correct the file") from error
        if not isinstance(values, dict):
            raise LedgerError(what="is no mapping of settings", where=str(file), fix="restore it from a copy")
        try:
            config = validated(cls, values, str(file))
        except EditError as error:
            raise LedgerError(what=error.what, where=error.where, fix=error.fix) from error
        config._written = values
        return config

    def text(self) -> str:
        """Return the config as YAML."""
        values = self.model_dump(mode="json")
        return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    @property
    def identity(self) -> str:
        """A digest of all that may not change."""
        # As written: a key that a later version adds does not make another model of it.
        written = self.model_dump(mode="json") if self._written is None else self._written
        return digest({key: value for key, value in written.items() if key not in _MAY_CHANGE}, 32)

    def editor(self, lm: LanguageModel) -> Editor:
        """Return the editor that the config describes."""
        return Editor(
            lm,
            self.method,
            self.policy,
            method_settings=self.method_settings,
            policy_settings=self.policy_settings,
            corpus=Corpus(self.stats.corpus, self.stats.tokens, self.stats.window_tokens),
            seed=self.seed,
        )

    def resolved(self, editor: Editor, lm: LanguageModel) -> LivingConfig:
        """Return the config with every open choice as it was made, so that later defaults do not change the model."""
        corpus = self.stats.corpus
        stats = self.stats.model_copy(update={"corpus": corpus and corpus.expanduser().resolve()})
        folder = Path(self.model).expanduser()
        return self.model_copy(
            update={
                "model": str(folder.resolve()) if folder.is_dir() else self.model,
                "dtype": str(lm.dtype).removeprefix("torch."),
                "method_settings": _absolute(editor.method.config.model_dump(mode="json")),
                "policy_settings": editor.policy.settings,
                "stats": stats,
                "conflicts": self.conflicts.resolved(by_subject=editor.method.traits.needs_subject),
            }
        )


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose files and folders are found from anywhere."""
    found = dict(settings)
    for name, value in settings.items():
        if (name == "checkpoint" or name.endswith("path")) and isinstance(value, str):
            found[name] = str(Path(value).expanduser().resolve())
    return found
