"""A finished or interrupted run as the source of an export: its model as it stands, its edits as the facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.settings import validated
from everedit.errors import RunFolderError
from everedit.evaluation import Evaluator
from everedit.experiments.config import RunConfig
from everedit.experiments.folder import RunFolder
from everedit.experiments.run import make_editor
from everedit.export import FactRecord, Source, measured
from everedit.models import load_model

__all__ = ["source_of_run"]


def source_of_run(path: str | Path, *, measure: bool = True, device: str | None = None) -> Source:
    """Return the model that the run in the folder ``path`` has edited so far, for :func:`everedit.export.export`.

    With ``measure`` its edits are scored once more, all of them on the model as it stands; the run's own scores of each
    edit are from right after it. Raises :class:`RunFolderError` if there is no run, it has made no edit yet, or its
    model is not what it was.
    """
    folder = RunFolder.open(Path(path))
    described = folder.read_json("config.json")
    config = validated(RunConfig, described["run"], str(folder.path / "config.json"))
    lm = load_model(config.model, device=device or config.device, dtype=config.dtype)
    if lm.fingerprint != described["model"]["fingerprint"]:
        raise RunFolderError(
            what="the model has changed since the run began", where=str(path), fix="start the run anew, then export"
        )
    editor = make_editor(lm, config)
    state, done = folder.load_state(lm.device)
    if not done:
        raise RunFolderError(what="the run has made no edit yet", where=str(path), fix="go on with it: --resume")
    editor.load_state(state)
    facts = [_record(row, described) for row in folder.rows("edits.jsonl")[:done]]
    return _measured(editor, config, facts) if measure else Source.of_editor(editor, facts)


def _measured(editor: Editor, config: RunConfig, facts: list[FactRecord]) -> Source:
    editor.evaluator = Evaluator(editor.lm, config.protocols)
    scored, damage = measured(editor, facts)
    return Source.of_editor(editor, scored, damage=damage)


def _record(row: dict[str, Any], described: dict[str, Any]) -> FactRecord:
    line, data = row.pop("line"), described["data"]
    return FactRecord(
        Edit.model_validate(row), at=described["created"], source=f"{Path(data['path']).name}, line {line}"
    )
