"""A run explains itself, sets bad records aside, and goes on after any interruption as if there had been none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from everedit import experiments
from everedit.cache import file_sha256
from everedit.cli.run import show_summary
from everedit.errors import EvereditError, RunFolderError
from everedit.evaluation import GENERAL
from everedit.experiments import RunConfig
from everedit.experiments.run import Silent
from everedit.methods.memit import Memit
from everedit.report import write_report
from everedit.report.results import protocol_results
from everedit.report.run_files import load_run
from everedit.report.wording import headline
from tests.support.editing import home_town
from tests.support.running import (
    MARKS,
    N_EDITS,
    Interrupting,
    records,
    rows_of,
    run_config,
    same_results,
    without_times,
    write_records,
)

METRICS = {"reliability", "generalization", "locality", "portability"}
TOKENS = "teacher-forced/token-accuracy@1"

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "edits.jsonl", records(N_EDITS))


Whole = tuple[RunConfig, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def whole(data: Path, corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run from beginning to end: its config, its folder and its summary."""
    out, config = tmp_path_factory.mktemp("runs") / "whole", run_config(data, corpus_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVEREDIT_CACHE", str(tmp_path_factory.mktemp("own")))
        return config, out, experiments.start(config, out, command="everedit run …")


# --------------------------------------------------------------------------- what a run leaves


def test_the_folder_explains_itself(whole: Whole, data: Path) -> None:
    config, out, _ = whole
    files = {path.name for path in out.iterdir()}
    assert files == {
        "config.json", "edits.jsonl", "base.json", "answers.json", "quarantine.jsonl", "metrics.jsonl", "samples.jsonl",
        "state.safetensors", "summary.json",
    }  # fmt: skip
    told = json.loads((out / "config.json").read_text())
    assert (told["method"], told["policy"], told["seed"], told["edits"]) == ("memit", "simie", 0, N_EDITS)
    assert told["data"]["sha256"] == file_sha256(data)
    assert told["model"]["family"] == "gpt2"
    assert len(told["model"]["fingerprint"]) == 64
    assert told["protocols"] == list(GENERAL)
    assert set(told["versions"]) == {"everedit", "torch", "transformers", "python"}
    assert told["settings"]["method"]["layers"] == [0, 1]
    assert told["settings"]["policy"]["lam"] == 1.0
    assert told["checkpoints"] == [*MARKS, N_EDITS]
    assert told["command"] == "everedit run …"
    assert "sha256" in told["statistics"]
    assert RunConfig.model_validate(told["run"]).model_dump(mode="json") == config.model_dump(mode="json")


def test_there_is_a_row_for_each_edit_and_each_checkpoint(whole: Whole) -> None:
    rows = rows_of(whole[1])
    assert [(row["kind"], row["n"]) for row in rows] == [
        ("edit", 1), ("checkpoint", 1), ("edit", 2), ("edit", 3), ("checkpoint", 3), ("edit", 4), ("edit", 5),
        ("checkpoint", 5),
    ]  # fmt: skip
    edits = [row for row in rows if row["kind"] == "edit"]
    assert [row["edit_id"] for row in edits] == [home_town(person).id for person in range(N_EDITS)]
    for row in edits:
        assert {"target", "keys", "solve", "policy", "score"} <= row["seconds"].keys()
        assert row["update_norm"] > 0
        assert row["memory_mb"] > 10
        for when in ("before", "immediate"):
            assert row[when].keys() == set(GENERAL)
            assert all(scores.keys() == METRICS for scores in row[when].values())
    assert all(row["before"][TOKENS]["reliability"] < 1 for row in edits)
    assert sum(row["immediate"][TOKENS]["reliability"] for row in edits) > sum(
        row["before"][TOKENS]["reliability"] for row in edits
    )


class Listening(Silent):
    """Keeps what it is told of steps."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, str]] = []

    def step(self, done: int, note: str = "") -> None:
        self.steps.append((done, note))


def test_what_is_not_asked_right_after_an_edit_is_asked_at_checkpoints_all_the_same(
    whole: Whole, tmp_path: Path
) -> None:
    config, out, summary = whole
    reporter = Listening()
    found = experiments.start(config.model_copy(update={"immediate": (TOKENS,)}), tmp_path / "few", reporter=reporter)
    # Before each checkpoint's scores, which may take longer than the edits, it is said what takes so long.
    assert [done for done, note in reporter.steps if note.startswith("scoring")] == [0, 2, N_EDITS - 1]
    for ours, theirs in zip(rows_of(tmp_path / "few"), rows_of(out), strict=True):
        if ours["kind"] == "edit":
            assert ours["immediate"] == {TOKENS: theirs["immediate"][TOKENS]}
            assert ours["before"] == theirs["before"]
        else:
            assert ours["retained"] == theirs["retained"]
    for name, scores in found["protocols"].items():
        last = scores["checkpoints"][str(N_EDITS)]
        told = summary["protocols"][name]["checkpoints"][str(N_EDITS)]
        assert last["retained"] == told["retained"]
        assert last["immediate"] == (told["immediate"] if name == TOKENS else dict.fromkeys(METRICS))
    few, full = [headline(protocol_results(load_run(folder))) for folder in (tmp_path / "few", out)]
    assert few.startswith(f"After {N_EDITS} edits the model still")
    assert full.startswith(few.removesuffix("."))
    write_report(tmp_path / "few")
    show_summary(found, tmp_path / "few")


@pytest.mark.parametrize(
    ("values", "about"),
    [
        ({"protocols": (TOKENS,), "immediate": ("rome/counterfact@1",)}, "none of the run's protocols"),
        ({"protocols": (TOKENS,), "immediate": (), "single": True}, "single edits have no other scores"),
    ],
)
def test_what_is_asked_right_after_an_edit_must_be_asked_at_all(values: dict[str, Any], about: str) -> None:
    with pytest.raises(ValueError, match=about):
        RunConfig.model_validate(values)


def test_the_summary_holds_every_number_asked_for(whole: Whole) -> None:
    _, out, summary = whole
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["protocols"].keys() == set(GENERAL)
    for scores in summary["protocols"].values():
        assert scores["unedited"].keys() == METRICS
        assert scores["unedited"]["locality"] == 1.0
        assert scores["checkpoints"].keys() == {"1", "3", "5"}
        for mark in scores["checkpoints"].values():
            assert mark.keys() == {"immediate", "retained", "uncontradicted", "first_100", "final"}
            assert all(row.keys() == METRICS for row in mark.values())
    assert {"target", "keys", "solve", "policy", "score", "total"} <= summary["seconds_per_edit"].keys()
    assert {"contexts", "statistics"} <= summary["seconds_before"].keys()
    assert not {"contexts", "statistics"} & summary["seconds_per_edit"].keys()
    phases = [value for phase, value in summary["seconds_per_edit"].items() if phase != "total"]
    assert summary["seconds_per_edit"]["total"] == pytest.approx(sum(phases))
    assert summary["peak_memory_mb"] > 50
    assert (summary["edits"], summary["quarantined"]) == (N_EDITS, 0)


def test_the_summary_is_made_of_the_rows(whole: Whole) -> None:
    _, out, summary = whole
    rows = rows_of(out)
    immediate = [row["immediate"][TOKENS]["reliability"] for row in rows if row["kind"] == "edit"]
    marks = summary["protocols"][TOKENS]["checkpoints"]
    for n in (1, 3, 5):
        assert marks[str(n)]["immediate"]["reliability"] == pytest.approx(sum(immediate[:n]) / n)
        retained = next(row for row in rows if row["kind"] == "checkpoint" and row["n"] == n)["retained"]
        assert marks[str(n)]["retained"] == retained[TOKENS]
    # After the first edit there is nothing to forget; at the end "retained" and "final" are one thing.
    assert marks["1"]["immediate"] == marks["1"]["retained"]
    assert marks["5"]["retained"] == marks["5"]["final"]


def test_samples_hold_both_models_raw_texts(whole: Whole) -> None:
    samples = rows_of(whole[1], "samples.jsonl")
    kinds = [sample["kind"] for sample in samples]
    assert [kinds.count(kind) for kind in ("rewrite", "rephrase", "locality", "portability")] == [5, 5, 10, 5]
    assert all({"edit_id", "prompt", "target", "base_text", "edited_text"} <= sample.keys() for sample in samples)
    assert any(sample["base_text"] != sample["edited_text"] for sample in samples)


def test_the_same_run_again_gives_the_same_numbers(whole: Whole, tmp_path: Path) -> None:
    experiments.start(whole[0], tmp_path / "again")
    same_results(whole[1], tmp_path / "again")


# --------------------------------------------------------------------------- interruptions

KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from everedit import experiments
from everedit.experiments.folder import RunFolder
from everedit.experiments import RunConfig
config, out, moment = RunConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

append, save = RunFolder.append, RunFolder.save_state
def cut_row(self, row):
    if moment == "half a row" and row["n"] == 3:
        with (self.path / "metrics.jsonl").open("a") as stream:
            stream.write('{"kind": "edit", "n": 3, "sec')
        die()
    append(self, row)
def cut_state(self, state, edits):
    if moment == "row without state" and edits == 3:
        die()
    save(self, state, edits)
RunFolder.append, RunFolder.save_state = cut_row, cut_state
class Marks:
    def stage(self, text, total=None): pass
    def step(self, done, note=""):
        if moment == "from outside" and done >= 2 and note:
            (out / "marker").touch()
            while True: signal.pause()
experiments.start(config, out, reporter=Marks())
"""


def interrupted_child(config: RunConfig, out: Path, moment: str) -> int:
    """Run in a process of its own that is killed, by itself at a chosen moment or by us; return its exit status."""
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, config.model_dump_json(), str(out), moment],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        if moment == "from outside":
            end = time.monotonic() + 60
            while not (out / "marker").exists() and child.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            (out / "marker").unlink()
            child.kill()
        said = child.communicate(timeout=90)[1]
    finally:
        child.kill()
    assert child.returncode == -signal.SIGKILL, said
    return child.returncode


class Counting:
    """Counts how many edits a method makes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        fit = Memit.fit

        def counted(method: Memit, bench: Any, edits: Any, *rest: Any) -> Any:
            self.made += [edit.id for edit in edits]
            return fit(method, bench, edits, *rest)

        monkeypatch.setattr(Memit, "fit", counted)


@pytest.mark.parametrize(("moment", "finished"), [("half a row", 2), ("row without state", 2), ("from outside", 2)])
def test_a_killed_run_resumes_to_the_same_end(
    whole: Whole, moment: str, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = whole[0], tmp_path / "killed"
    interrupted_child(config, out, moment)
    kept = [line for line in (out / "metrics.jsonl").read_text().split("\n") if line]
    assert not (out / "summary.json").exists()
    counting = Counting(monkeypatch)
    summary = experiments.resume(out)
    same_results(whole[1], out)
    assert without_times(summary) == without_times(whole[2])
    assert counting.made == [home_town(person).id for person in range(finished, N_EDITS)]
    # The rows of finished edits, with the times they took, are the very ones from before.
    done = finished + 1  # the checkpoint after the first edit has a row, too
    assert (out / "metrics.jsonl").read_text().split("\n")[:done] == kept[:done]
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "changes", [{"policy_settings": {"start": "base"}}, {"method": "rome", "policy": "accumulate"}]
)
@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_run_resumes_to_the_same_end(
    after: int, changes: dict[str, Any], data: Path, corpus_path: Path, tmp_path: Path
) -> None:
    config = run_config(data, corpus_path, "llama", **changes)
    experiments.start(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        experiments.start(config, tmp_path / "cut", reporter=Interrupting(after))
    rows = rows_of(tmp_path / "cut")
    assert len([row for row in rows if row["kind"] == "edit"]) == after
    experiments.resume(tmp_path / "cut")
    same_results(tmp_path / "whole", tmp_path / "cut")
    # Interrupted once more after its end, or resumed for no reason, it stays what it was.
    experiments.resume(tmp_path / "cut")
    same_results(tmp_path / "whole", tmp_path / "cut")


def test_an_interruption_before_the_first_edit_leaves_no_run(whole: Whole, tmp_path: Path) -> None:
    class Early(Silent):
        def stage(self, text: str, total: int | None = None) -> None:
            if "unedited" in text:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        experiments.start(whole[0], tmp_path / "run", reporter=Early())
    with pytest.raises(RunFolderError, match="no run to resume"):
        experiments.resume(tmp_path / "run")
    experiments.start(whole[0], tmp_path / "run")
    same_results(whole[1], tmp_path / "run")


# --------------------------------------------------------------------------- folders that will not do


def test_a_folder_with_a_run_is_not_overwritten(whole: Whole) -> None:
    before = {path.name: path.read_bytes() for path in whole[1].iterdir()}
    with pytest.raises(RunFolderError, match=r"(?s)holds a run already.*--resume"):
        experiments.start(whole[0], whole[1])
    assert {path.name: path.read_bytes() for path in whole[1].iterdir()} == before


def test_an_output_folder_that_cannot_be_made_is_one_clear_error(whole: Whole, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    config = whole[0].model_copy(update={"model": "/no/such/model"})  # met before the model is
    with pytest.raises(RunFolderError, match=r"(?s)cannot be written.*choose another --out"):
        experiments.start(config, tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "not a folder"
    # A run that cannot begin leaves no folder behind.
    with pytest.raises(EvereditError, match="/no/such/model"):
        experiments.start(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_run_says_what_is_damaged(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        experiments.start(whole[0], out, reporter=Interrupting(2))
    (out / "state.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(EvereditError, match=r"damaged.*state\.safetensors"):
        experiments.resume(out)
    (out / "config.json").write_text("{")
    with pytest.raises(EvereditError, match=r"config\.json"):
        experiments.resume(out)


def test_a_run_does_not_go_on_with_another_model(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        experiments.start(whole[0], out, reporter=Interrupting(2))
    told = json.loads((out / "config.json").read_text())
    told["model"]["fingerprint"] = "0" * 64
    (out / "config.json").write_text(json.dumps(told))
    with pytest.raises(EvereditError, match="the model has changed"):
        experiments.resume(out)
