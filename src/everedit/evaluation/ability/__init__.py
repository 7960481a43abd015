"""General ability: what a model can do besides the facts that are edited, before and after.

Tasks on local files are listed in :data:`TASKS`; :mod:`everedit.evaluation.ability.harness` runs those of lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from everedit.errors import EditError, near_names
from everedit.evaluation.ability import perplexity, published, tasks
from everedit.evaluation.ability._base import Measured, Record, Task
from everedit.evaluation.ability.harness import Harness
from everedit.models import LanguageModel

__all__ = ["TASKS", "Ability", "AbilityConfig", "Measured", "Task"]

TASKS = {task.name: task for task in (*tasks.TASKS, *perplexity.TASKS, *published.TASKS)}
_OWN_TEXT = "text@1"


class AbilityConfig(BaseModel):
    """Which tasks of general ability are measured, and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = Field((), description="tasks on local files (everedit ability ls)")
    path: Path | None = Field(None, description="the folder with their files")
    limit: int = Field(100, ge=1, description="records of each task")
    text: Path | None = Field(None, description="a text of your own for its perplexity: plain, or JSONL with text")
    lm_eval: tuple[str, ...] = Field((), description="tasks of the lm-eval harness")
    include_path: Path | None = Field(None, description="a folder with lm-eval tasks of your own")


@dataclass
class Ability:
    """Measures models on the tasks of a config; files and names are checked when it is made.

    Raises :class:`everedit.errors.EvereditError` for an unknown task or a file that is not there.
    """

    config: AbilityConfig
    seed: int = 0
    _records: list[tuple[Task, list[Record]]] = field(default_factory=list, init=False)
    _harness: Harness | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in self.config.tasks:
            task = _task(name)
            most = min(self.config.limit, task.most or self.config.limit) + task.skip
            self._records.append((task, _read(_found(task, self.config.path), most)))
        if self.config.text is not None:
            own = perplexity.task(_OWN_TEXT, str(self.config.text), str(self.config.text))
            self._records.append((own, _texts(self.config.text, self.config.limit)))
        if self.config.lm_eval:
            self._harness = Harness(self.config.lm_eval, self.config.limit, self.config.include_path)

    @property
    def names(self) -> list[str]:
        """The names of what is measured."""
        return [*(task.name for task, _ in self._records), *self.config.lm_eval]

    def measure(self, lm: LanguageModel) -> Iterable[Measured]:
        """Yield the figures of a model as it is now, task by task."""
        for task, records in self._records:
            yield task.measured(lm, records, self.seed)
        if self._harness is not None:
            yield from self._harness.measure(lm, self.seed)


def _task(name: str) -> Task:
    found = TASKS.get(name) or TASKS.get(f"{name}@1")
    if found is None:
        raise near_names("task", name, list(TASKS))
    return found


def _found(task: Task, folder: Path | None) -> Path:
    """Return a task's file in a folder of data, or in the one of its parts that holds it."""
    if folder is None:
        raise EditError(
            what=f"the task {task.name} needs its records",
            fix=f"name the folder that holds {task.file} (--path, or ability.path in a run)",
        )
    places = [folder.expanduser() / task.file, folder.expanduser() / Path(task.file).name]
    for place in places:
        if place.is_file():
            return place
    raise EditError(
        what=f"the file of the task {task.name} is not there",
        where=str(folder),
        fix=f"looked for {' and '.join(map(str, places))}",
    )


def _read(path: Path, most: int) -> list[Record]:
    records: list[Record] = []
    try:
        # Not splitlines(): texts may hold Unicode line separators.
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                if line.strip() and len(records) < most:
                    records.append(json.loads(line))
    except (OSError, ValueError) as error:
        raise EditError(what=f"cannot read the records: {error}", where=str(path), fix="give JSON Lines") from error
    return records


def _texts(path: Path, most: int) -> list[dict[str, Any]]:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _read(path, most)
    try:
        content = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(what=f"cannot read the text: {error}", where=str(path), fix="give UTF-8 text") from error
    paragraphs: Sequence[str] = [part for part in content.split("\n\n") if part.strip()]
    return [{"text": part.strip()} for part in paragraphs[:most]]
