"""Recipes for the headline tables of papers: a sweep at full size, a small one, and what they are expected to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from everedit.cache import write_json
from everedit.data import data_set
from everedit.errors import EditError, RunFolderError, near_names
from everedit.experiments.config import problems_of, read_yaml
from everedit.experiments.recipes.claims import Claim, Form, Line, Published, judged
from everedit.experiments.sweeps.config import SweepConfig
from everedit.report.collect import collect

__all__ = ["Form", "Line", "Ready", "Recipe", "conclude", "judged", "recipe", "recipe_names"]

_FOLDER = Path(__file__).parent
_CORPUS = "text/wikipedia_sample.jsonl"


@dataclass(frozen=True)
class Ready:
    """A recipe's sweep, ready to be made, and ``notes`` on what in it is not as the recipe says."""

    sweep: SweepConfig
    notes: list[str]


class Recipe(BaseModel):
    """A headline table and how to make it.

    ``trained`` are methods that take part if a checkpoint is given for them; ``built_in`` is the data set that the
    small form makes do with where no folder of data is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    paper: str
    about: str
    full: dict[str, Any]
    small: dict[str, Any]
    trained: tuple[str, ...] = ()
    built_in: str = ""
    claims: tuple[Claim, ...]
    published: tuple[Published, ...] = ()

    def ready(
        self,
        name: str,
        form: Form,
        *,
        data: Path | None = None,
        models: Sequence[str] = (),
        checkpoints: Mapping[str, Path] | None = None,
        settings: Sequence[str] = (),
    ) -> Ready:
        """Return the sweep of a form, on ``models`` if any are given, with data sets and text from the folder ``data``.

        Raises :class:`EditError` if the form needs data and none are given, or a checkpoint is for no method of it.
        ``settings`` are what a user sets besides, in the form of ``--set``.
        """
        values = {**(self.full if form == "full" else self.small)}
        notes: list[str] = []
        if models:
            values["models"] = list(models)
        values["methods"] = [*values["methods"], *self._trained(checkpoints or {}, notes)]
        values["data"] = self._data(name, form, values["data"], data, notes)
        values["run"] = {**values.get("run", {})}
        if "ability" in values["run"]:
            # The tasks' files are where the data sets are.
            values["run"]["ability"] = {**values["run"]["ability"], "path": str(data)}
        corpus = data / _CORPUS if data is not None else None
        if corpus is not None and corpus.is_file():
            values["run"]["stats.corpus"] = str(corpus)
        elif not any(setting.startswith("stats.corpus=") for setting in settings):
            notes.append("second moments are gathered over text sampled from the model (--set stats.corpus=FILE)")
        title = f"{self.title}{', small form' if form == 'small' else ''}"
        return Ready(SweepConfig.parse({"title": title, **values}, f"recipe {name}"), notes)

    @staticmethod
    def source(name: str) -> str:
        """Return the text of a recipe's file."""
        return (_FOLDER / f"{name}.yaml").read_text(encoding="utf-8")

    def _trained(self, checkpoints: Mapping[str, Path], notes: list[str]) -> list[dict[str, Any]]:
        for method in checkpoints:
            if method not in self.trained:
                known = ", ".join(self.trained) or "none"
                raise EditError(
                    what=f"the recipe takes no checkpoint for '{method}'",
                    where="--checkpoint",
                    fix=f"it takes: {known}",
                )
        if missing := [method for method in self.trained if method not in checkpoints]:
            notes.append(
                f"left out, since trained first: {', '.join(missing)} (everedit train; --checkpoint NAME=FOLDER)"
            )
        return [{"name": method, "set": {"method.checkpoint": str(folder)}} for method, folder in checkpoints.items()]

    def _data(self, name: str, form: Form, wanted: list[Any], data: Path | None, notes: list[str]) -> list[Any]:
        listed = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in wanted]
        needed = [entry for entry in listed if data_set(entry["name"]).built_in is None]
        if not needed:
            return listed
        if data is not None:
            return [{**entry, "path": str(data)} if entry in needed else entry for entry in listed]
        if form == "small" and self.built_in:
            notes.append(f"on {self.built_in} instead of {', '.join(e['name'] for e in needed)} (--data FOLDER)")
            return [{"name": self.built_in}]
        raise EditError(
            what=f"the recipe needs the data sets {', '.join(entry['name'] for entry in needed)}",
            where=f"everedit reproduce {name}",
            fix="give the folder that they are in: --data FOLDER (everedit data ls says which files are looked for)",
        )


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def recipe(name: str) -> Recipe:
    """Return the recipe called ``name``.

    Raises :class:`everedit.errors.UnknownName` with near names, or :class:`EditError` if its file is damaged.
    """
    if name not in recipe_names():
        raise near_names("recipe", name, recipe_names())
    file = _FOLDER / f"{name}.yaml"
    try:
        return Recipe.model_validate(read_yaml(file))
    except ValidationError as error:
        raise EditError(what=f"bad recipe: {problems_of(error)}", where=str(file), fix="mend the file") from error


def conclude(chosen: Recipe, name: str, form: Form, folder: Path, notes: Sequence[str]) -> list[Line]:
    """Hold what the sweep in ``folder`` found against a recipe's claims; write ``reproduction.json`` there and return
    the lines.
    """
    try:
        results = collect([folder])
    except RunFolderError:
        # Every cell failed: then nothing was measured.
        results = []
    lines = judged(chosen.claims, chosen.published, results, form)
    told = {"recipe": name, "form": form, "title": chosen.title, "paper": chosen.paper, "about": chosen.about}
    write_json(folder / "reproduction.json", {**told, "notes": list(notes), "lines": [vars(line) for line in lines]})
    return lines
