"""Runs that make several edits at once: the same patch as the editor's own batch, a row for each edit all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everedit.errors import NotApplicable, NumericalError
from everedit.experiments import resume, start
from everedit.experiments.folder import RunFolder
from everedit.methods.memit import Memit
from tests.support.editing import home_town, make_editor
from tests.support.running import full_edit, records, rows_of, run_config, write_records

pytestmark = pytest.mark.usefixtures("own_cache")
SETTINGS: dict[str, Any] = {"policy": "accumulate", "batch": 2, "edits": 5, "checkpoints": (1, 3)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "edits.jsonl", records(6))


def test_a_run_in_batches_is_the_editors_stream_of_batches(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = start(run_config(data, corpus_path, **SETTINGS), out)
    rows = [row for row in rows_of(out) if row["kind"] == "edit"]
    assert [row["n"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["update_norm"] == rows[1]["update_norm"] != rows[2]["update_norm"]
    # A mark inside a batch is scored at the batch's end.
    assert list(summary["protocols"]["teacher-forced/token-accuracy@1"]["checkpoints"]) == ["2", "4", "5"]
    editor = make_editor("gpt2", corpus_path, "memit")
    for _ in editor.stream([full_edit(person) for person in range(5)], batch=2):
        pass
    saved, done = RunFolder(out).load_state(torch.device("cpu"))
    assert done == 5
    expected = editor.state().weights.masters
    assert saved.weights.masters.keys() == expected.keys()
    assert all(torch.equal(saved.weights.masters[name], expected[name]) for name in expected)


def test_an_edit_that_fails_inside_a_batch_is_found_and_set_aside(
    data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, plain = full_edit(3).subject, Memit.targets

    def failing(self: Memit, bench: Any, edits: Any, prefixes: Any = None) -> Any:
        if any(edit.subject == bad for edit in edits):
            raise NumericalError(what="planted")
        return plain(self, bench, edits, prefixes)

    monkeypatch.setattr(Memit, "targets", failing)
    out = tmp_path / "run"
    summary = start(run_config(data, corpus_path, **SETTINGS), out)
    assert summary["edits"] == 4
    assert [row["subject"] for row in rows_of(out) if row["kind"] == "edit"] == [
        full_edit(person).subject for person in (0, 1, 2, 4)
    ]
    [row] = rows_of(out, "quarantine.jsonl")
    assert (row["reason"], row["record"]["subject"]) == ("planted", bad)


def test_a_run_in_batches_resumes_at_the_last_whole_batch(
    data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start(run_config(data, corpus_path, **SETTINGS), tmp_path / "whole")
    plain, calls = Memit.targets, 0

    def interrupted(self: Memit, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return plain(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Memit, "targets", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(run_config(data, corpus_path, **SETTINGS), tmp_path / "run")
    again = resume(tmp_path / "run")
    assert again["protocols"] == whole["protocols"]


def test_batches_of_a_method_that_makes_one_edit_at_a_time_are_refused(
    data: Path, corpus_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(NotApplicable, match="rome makes one edit at a time, and batches of 2"):
        start(run_config(data, corpus_path, method="rome", **SETTINGS), tmp_path / "run")
    with pytest.raises(NotApplicable, match="solves_batches"):
        next(make_editor("gpt2", corpus_path, "rome").stream([home_town(0)], batch=3))
