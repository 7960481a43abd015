"""A run's folder as a source of exports: the model as the run left it, and its edits as the facts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from everedit import experiments
from everedit.errors import EvereditError, RunFolderError
from everedit.experiments import source_of_run
from everedit.experiments.folder import RunFolder
from everedit.export import export
from tests.support import tiny
from tests.support.running import N_EDITS, records, run_config, write_records

pytestmark = pytest.mark.usefixtures("own_cache")

TOKENS = "teacher-forced/token-accuracy@1"


@pytest.fixture(scope="module")
def run(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data = write_records(folder / "edits.jsonl", records(N_EDITS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVEREDIT_CACHE", str(folder / "cache"))
        experiments.start(run_config(data, corpus_path, "llama", protocols=(TOKENS,)), folder / "run")
    return folder / "run"


def test_what_the_run_left_is_what_is_exported(run: Path, tmp_path: Path) -> None:
    source = source_of_run(run)
    export(source, "merged", tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    state, done = RunFolder.open(run).load_state(torch.device("cpu"))
    assert done == N_EDITS
    assert state.weights.masters
    for name, master in state.weights.masters.items():
        assert torch.equal(weights[name], master)
    summary = json.loads((run / "summary.json").read_text())["protocols"][TOKENS]["checkpoints"][str(N_EDITS)]
    assert source.damage is not None
    for metric, value in summary["retained"].items():
        assert source.damage.after[TOKENS][metric] == pytest.approx(value), metric
    assert [fact.edit.prompt for fact in source.facts] == [record["prompt"] for record in records(N_EDITS)]
    assert source.facts[2].source == "edits.jsonl, line 3"
    assert source.facts[0].at == json.loads((run / "config.json").read_text())["created"]


def test_measuring_can_be_left_out(run: Path) -> None:
    source = source_of_run(run, measure=False)
    assert (source.damage, source.facts[0].after) == (None, {})
    assert source.roundings == N_EDITS


def test_a_run_that_cannot_be_exported_says_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run"):
        source_of_run(tmp_path)
    for name in ("config.json", "edits.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(RunFolderError, match="made no edit yet"):
        source_of_run(tmp_path)
    described = json.loads((run / "config.json").read_text())
    described["run"]["model"] = str(tiny.trained("qwen2"))
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(RunFolderError, match="model has changed"):
        source_of_run(tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"), [({"edits": "many"}, "bad settings: edits"), ({"method": "nothing"}, "unknown method")]
)
def test_a_damaged_config_is_an_error_of_ours(settings: dict[str, str], reason: str, run: Path, tmp_path: Path) -> None:
    described = json.loads((run / "config.json").read_text())
    described["run"].update(settings)
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(EvereditError, match=reason):
        source_of_run(tmp_path)
