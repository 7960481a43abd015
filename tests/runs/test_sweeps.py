"""A sweep gives the numbers of its runs, however it is made, interrupted, extended or hit by a failing cell."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from everedit import experiments
from everedit.cli.main import app
from everedit.errors import CacheError, RunFolderError
from everedit.experiments.sweeps import CellState, LocalWorkers, SweepFolder, drive, states_of
from tests.support import facts
from tests.support.loading import edit_of
from tests.support.running import records, same_results, without_times, write_records
from tests.support.sweeping import Here, made_here, new_sweep, quietly, sweep_values, write_sweep

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "edits.jsonl", records(12))


@pytest.fixture(scope="module")
def whole(data: Path, corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepFolder:
    """A sweep of two cells, made one after the other in this process."""
    root = tmp_path_factory.mktemp("sweeps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVEREDIT_CACHE", str(root / "cache"))
        folder = new_sweep(root / "whole", sweep_values(data, corpus_path))
        assert [state.status for state in made_here(folder)] == ["done", "done"]
    return folder


def same_sweeps(one: SweepFolder, other: SweepFolder) -> None:
    assert [cell.name for cell in one.manifest.cells] == [cell.name for cell in other.manifest.cells]
    for cell in one.manifest.cells:
        same_results(one.cell(cell), other.cell(cell))


def statuses(states: list[CellState]) -> dict[str, str]:
    return {state.cell.axes["method"]: state.status for state in states}


# --------------------------------------------------------------------------- cells are runs


def test_a_cell_is_the_run_of_its_config(whole: SweepFolder, tmp_path: Path) -> None:
    for cell in whole.manifest.cells:
        experiments.start(cell.config, tmp_path / cell.name)
        same_results(whole.cell(cell), tmp_path / cell.name)
        left = {path.name for path in whole.cell(cell).iterdir()} - {
            path.name for path in (tmp_path / cell.name).iterdir()
        }
        assert left == {"report.html"}


def test_cells_ask_the_unedited_model_once_and_a_damaged_copy_is_asked_again(
    whole: SweepFolder, tmp_path: Path
) -> None:
    ours = tmp_path / "shared" / "answers"
    shutil.copytree(whole.path / "answers", ours)
    one, other = whole.manifest.cells
    [kept] = ours.iterdir()
    told = kept.read_bytes()
    assert (whole.cell(one) / "base.json").read_bytes() == told == (whole.cell(other) / "base.json").read_bytes()

    # What is there is taken as it is: with another loss in it, that loss is the unedited one.
    changed = json.loads(told)
    changed["readings"][0][-1] += 1.0
    kept.write_text(json.dumps(changed), encoding="utf-8")
    experiments.start(one.config, tmp_path / "trusting", shared=ours.parent)
    assert json.loads((tmp_path / "trusting" / "base.json").read_bytes()) == changed

    kept.write_bytes(told[: len(told) // 2])
    experiments.start(one.config, tmp_path / "again", shared=ours.parent)
    assert kept.read_bytes() == told
    same_results(whole.cell(one), tmp_path / "again")


def test_side_by_side_is_as_one_after_another_and_no_cell_takes_others_with_it(
    whole: SweepFolder, data: Path, corpus_path: Path, tmp_path: Path
) -> None:
    """Two processes at a time make the cells of ``whole``, one that must fail, and one that is killed."""
    corpus, values = tmp_path / "corpus.txt", sweep_values(data, corpus_path)
    failing = {**values["methods"][1]["set"], "stats.corpus": str(corpus)}
    values["methods"] += [{"name": "memit", "label": "failing", "set": failing}]
    values["methods"] += [{**values["methods"][0], "label": "killed"}]
    folder = new_sweep(tmp_path / "sweep", values)
    workers, victim = LocalWorkers(2), folder.manifest.cells[3]
    running: list[int] = []

    def watch(states: Any) -> None:
        running.append(sum(state.status == "running" for state in states))
        for job, process, _ in workers._running:
            if job.name == victim.name and (folder.cell(victim) / "progress.json").exists():
                process.kill()

    states = drive(folder, workers, watch)
    assert statuses(states) == {"ft": "done", "memit": "done", "failing": "failed", "killed": "failed"}
    assert max(running) == 2
    for cell in whole.manifest.cells:
        same_results(whole.cell(cell), folder.cell(cell))
        # Nothing that belongs to the making is left behind.
        assert {"progress.json", "worker.log"}.isdisjoint(path.name for path in folder.cell(cell).iterdir())
    assert "EditError: cannot read the corpus" in states[2].note
    told = json.loads((folder.cell(states[2].cell) / "error.json").read_text())
    assert told["where"] == str(corpus)
    assert told["fix"]
    assert "ended by SIGKILL" in states[3].note

    # The cause mended, the same sweep is resumed: what failed is made, and nothing else.
    shutil.copy(corpus_path, corpus)
    here = Here()
    assert set(statuses(drive(SweepFolder.open(folder.path), here, quietly)).values()) == {"done"}
    assert here.made == [cell.name for cell in folder.manifest.cells[2:]]
    assert not list(folder.path.rglob("error.json"))


# --------------------------------------------------------------------------- interruptions


def edits_made(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count('"kind": "edit"') if file.exists() else 0


def wait_for(condition: Any, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_a_killed_sweep_resumes_to_the_same_numbers(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    """Killed while cells are in the middle of their streams; the workers must not write on after it."""
    values = sweep_values(data, corpus_path)
    values["run"] |= {"edits": 12, "checkpoints": [1, 5]}
    whole = new_sweep(tmp_path / "whole", values)
    made_here(whole)
    file, out = write_sweep(tmp_path / "two.yaml", values), tmp_path / "killed"
    command = [sys.executable, "-m", "everedit", "sweep", str(file), "--out", str(out), "--jobs", "2"]
    driver = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    cut = out / "cells" / whole.manifest.cells[1].name
    try:
        wait_for(lambda: edits_made(cut) >= 3 or driver.poll() is not None, "no cell came to its third edit")
        driver.kill()
        assert driver.wait() == -signal.SIGKILL, driver.communicate()[1]
    finally:
        driver.kill()
        driver.communicate()
    assert not (cut / "summary.json").exists()
    time.sleep(1.0)
    kept = (cut / "metrics.jsonl").read_text()
    time.sleep(1.0)
    assert (cut / "metrics.jsonl").read_text() == kept

    killed = SweepFolder.open(out)
    assert statuses(drive(killed, Here(), quietly)) == {"ft": "done", "memit": "done"}
    same_sweeps(whole, killed)
    # The rows of finished edits, with the times they took, are the very ones from before.
    rows = [line for line in kept.split("\n") if line][:2]
    assert (cut / "metrics.jsonl").read_text().split("\n")[:2] == rows


def test_an_interrupted_sweep_stops_its_workers_and_says_how_to_go_on(
    data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write_sweep(tmp_path / "two.yaml", sweep_values(data, corpus_path)), tmp_path / "a sweep"
    processes: list[subprocess.Popen[str]] = []

    def interrupted(workers: LocalWorkers, seconds: float) -> Any:
        processes.extend(process for _, process, _ in workers._running)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LocalWorkers, "ended", interrupted)
    result = CliRunner().invoke(app, ["sweep", str(file), "--out", str(out), "--jobs", "2"])
    assert result.exit_code == 130
    assert f"everedit sweep --resume --out '{out}'" in " ".join(result.stdout.split())
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


# --------------------------------------------------------------------------- failures


def test_what_nobody_foresaw_fails_its_cell_alone(
    data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everedit.methods.memit import Memit

    def runs_out(*_: Any) -> Any:
        raise MemoryError("no room for 3 TiB")

    monkeypatch.setattr(Memit, "fit", runs_out)
    folder = new_sweep(tmp_path / "sweep", sweep_values(data, corpus_path))
    states = made_here(folder)
    assert statuses(states) == {"ft": "done", "memit": "failed"}
    told = json.loads((folder.cell(states[1].cell) / "error.json").read_text())
    assert told["error"] == "MemoryError"
    assert "no room for 3 TiB" in told["what"]
    assert "runs_out" in told["traceback"]


def test_two_processes_do_not_work_on_one_sweep(whole: SweepFolder) -> None:
    with whole.alone(), pytest.raises(CacheError, match="another process is at work"):
        made_here(SweepFolder.open(whole.path))


# --------------------------------------------------------------------------- other sweeps


def test_a_changed_file_extends_a_sweep_and_keeps_what_is_made(
    whole: SweepFolder, data: Path, corpus_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole.path, tmp_path / "sweep")
    folder = SweepFolder.open(tmp_path / "sweep")
    values = sweep_values(data, corpus_path, seeds=[0, 1])
    values["methods"] = values["methods"][:1]
    grown = new_sweep(tmp_path / "other", values)
    folder = folder.extended(grown.manifest.cells, "")
    here = Here()
    states = drive(folder, here, quietly)
    assert [(state.cell.axes["seed"], state.status) for state in states] == [("0", "done"), ("1", "done")]
    assert here.made == [states[1].cell.name]
    assert folder.strays() == [whole.manifest.cells[1].name]


def test_a_sweep_of_roll_backs(corpus_path: Path, tmp_path: Path) -> None:
    known = [edit_of(fact, ground_truth=fact.answer) for fact in facts.facts()[:8]]
    rows = [edit.model_dump(mode="json", exclude_defaults=True) for edit in known]
    values = sweep_values(write_records(tmp_path / "known.jsonl", rows), corpus_path, kind="rollback", untouched=3)
    values["methods"], values["run"]["edits"] = values["methods"][:1], 2
    folder = new_sweep(tmp_path / "sweep", values)
    assert [state.status for state in made_here(folder)] == ["done"]
    [cell] = folder.manifest.cells
    found = json.loads((folder.cell(cell) / "rollback.json").read_text())
    direct = experiments.rollback_run(cell.config, 3, tmp_path / "direct")
    assert without_times(found) == without_times(json.loads(json.dumps(direct)))
    assert found["checkpoints"]["2"].keys() == {"ES", "GS", "LS", "ERS", "ORS", "S"}


def test_folders_that_will_not_do(whole: SweepFolder, data: Path, corpus_path: Path, tmp_path: Path) -> None:
    values = sweep_values(data, corpus_path)
    with pytest.raises(RunFolderError, match=r"(?s)holds a sweep already.*--resume"):
        new_sweep(whole.path, values)
    with pytest.raises(RunFolderError, match="holds a run already"):
        new_sweep(whole.cell(whole.manifest.cells[0]), values)
    with pytest.raises(RunFolderError, match="cannot be written"):
        new_sweep(data / "sweep", values)
    with pytest.raises(RunFolderError, match="no sweep to resume"):
        SweepFolder.open(tmp_path)
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"manifest.*sweep\.json"):
        SweepFolder.open(tmp_path)
    assert [state.status for state in states_of(whole)] == ["done", "done"]


# --------------------------------------------------------------------------- on Ray


def test_a_local_ray_gives_the_same_numbers(whole: SweepFolder, data: Path, corpus_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    values = sweep_values(data, corpus_path)
    # One of them fails, and takes nothing with it.
    values["methods"] = [values["methods"][0], {"name": "rome", "set": {"method.layer": 99}}]
    file, out = write_sweep(tmp_path / "two.yaml", values), tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "everedit",
        "sweep",
        str(file),
        "--out",
        str(out),
        "--jobs",
        "2",
        "--json",
        "--ray",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1, done.stderr
    first, second = json.loads(done.stdout)["cells"]
    assert (first["status"], second["status"]) == ("done", "failed")
    assert "no layer 99" in second["note"]
    made, cell = SweepFolder.open(out), whole.manifest.cells[0]
    assert made.manifest.cells[0] == cell
    same_results(whole.cell(cell), made.cell(cell))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer_is_one_clear_error(address: str, whole: SweepFolder) -> None:
    pytest.importorskip("ray")
    result = CliRunner().invoke(app, ["sweep", "--resume", "--out", str(whole.path), "--ray", address])
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "Traceback" not in said
    assert address in said
    assert "what to do:" in said
    assert [state.status for state in states_of(whole)] == ["done", "done"]
