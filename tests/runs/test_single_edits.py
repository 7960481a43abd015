"""Runs of single edits, each taken back before the next; streams in a drawn order; what checkpoints write down."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit import experiments
from everedit.edit import Edit
from everedit.engine.bench import Workbench
from everedit.engine.target import Target
from everedit.errors import NotApplicable
from everedit.experiments.run import make_editor
from everedit.methods.memit import Memit
from everedit.models import load_model
from everedit.patch import load_tensors
from everedit.report.collect import collect
from everedit.report.tables import tables
from tests.support.running import (
    N_EDITS,
    Interrupting,
    records,
    rows_of,
    run_config,
    without_times,
    write_records,
)

TOKENS = "teacher-forced/token-accuracy@1"

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "edits.jsonl", records(N_EDITS))


def edits_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(folder) if row["kind"] == "edit"]


@pytest.mark.parametrize("policy", [{"policy": "accumulate"}, {"policy_settings": {"start": "base"}}])
def test_single_edits_score_as_trials_do(policy: dict[str, Any], data: Path, corpus_path: Path, tmp_path: Path) -> None:
    config = run_config(data, corpus_path, single=True, **policy)
    assert config.checkpoints == (N_EDITS,)
    summary = experiments.start(config, tmp_path / "run")
    editor = make_editor(load_model(config.model, device="cpu"), config)
    for row, record in zip(edits_of(tmp_path / "run"), records(N_EDITS), strict=True):
        with editor.trial(Edit.model_validate(record)) as result:
            assert row["immediate"] == result.after[0].scores
    # A stream would have left its marks on later edits.
    experiments.start(config.model_copy(update={"single": False}), tmp_path / "stream")
    alone, together = (edits_of(tmp_path / name)[-1]["update_norm"] for name in ("run", "stream"))
    assert alone != pytest.approx(together, rel=1e-3)
    # Nothing is forgotten by what is taken back at once.
    [at_end] = summary["protocols"][TOKENS]["checkpoints"].values()
    assert at_end["immediate"] == at_end["retained"] == at_end["final"]


def test_single_edits_interrupted_resume_to_the_same_end(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    config = run_config(data, corpus_path, single=True, policy_settings={"start": "base"})
    whole = experiments.start(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        experiments.start(config, tmp_path / "cut", reporter=Interrupting(2))
    with (tmp_path / "cut" / "samples.jsonl").open("a") as stream:
        stream.write('{"edit_id": "half')
    assert without_times(experiments.resume(tmp_path / "cut")) == without_times(whole)
    assert rows_of(tmp_path / "cut", "samples.jsonl") == rows_of(tmp_path / "whole", "samples.jsonl")
    assert without_times(rows_of(tmp_path / "cut")) == without_times(rows_of(tmp_path / "whole"))


def test_a_drawn_order_is_the_seeds(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    in_file = [record["prompt"] for record in records(N_EDITS)]
    for seed in (1, 2):
        config = run_config(data, corpus_path, method="ft", policy="accumulate", shuffle=True, seed=seed)
        experiments.start(config, tmp_path / str(seed))
        expected = list(in_file)
        random.Random(seed).shuffle(expected)
        assert [row["prompt"] for row in edits_of(tmp_path / str(seed))] == expected != in_file


def test_a_checkpoint_holds_every_edits_score_and_the_weights_growth(
    data: Path, corpus_path: Path, tmp_path: Path
) -> None:
    config = run_config(data, corpus_path, policy="accumulate")
    experiments.start(config, tmp_path / "run")
    marks = [row for row in rows_of(tmp_path / "run") if row["kind"] == "checkpoint"]
    for row in marks:
        for name, scores in row["by_edit"].items():
            for metric, values in scores.items():
                assert len(values) == row["n"]
                known = [value for value in values if value is not None]
                assert row["retained"][name][metric] == (pytest.approx(sum(known) / len(known)) if known else None)
    lm = load_model(config.model, device="cpu")
    tensors, _ = load_tensors(tmp_path / "run" / "state.safetensors")
    assert marks[-1]["singular_value_ratio"]
    for name, ratio in marks[-1]["singular_value_ratio"].items():
        base = dict(lm.model.named_parameters())[name].detach().double()
        now = tensors[f"weights|{name}"].double()
        found = torch.linalg.svdvals(now)[0] / torch.linalg.svdvals(base)[0]
        assert ratio == pytest.approx(float(found), rel=1e-6)
        assert ratio != 1


def test_a_stream_beneath_prune_is_the_stream_without_it(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    # A method that writes much, so that there is something to restrain.
    config = run_config(data, corpus_path, method="ft", policy="accumulate", method_settings={"lr": 0.01})
    experiments.start(config, tmp_path / "plain")
    pruned = config.model_copy(update={"policy": "prune", "policy_settings": {"function": "log"}, "beneath": True})
    experiments.start(pruned, tmp_path / "pruned")
    plain, under, shown = collect([tmp_path / "plain"])[0], *reversed(collect([tmp_path / "pruned"]))
    assert [run.line for run in (plain, under, shown)] == ["FT", "FT", "FT + PRUNE"]
    for when in ("immediate", "retained", "uncontradicted"):
        for mark in plain.marks:
            assert under.scores(TOKENS, mark, when) == plain.scores(TOKENS, mark, when)
    assert under.growth == plain.growth != shown.growth
    assert under.interval(TOKENS, "reliability", N_EDITS) == plain.interval(TOKENS, "reliability", N_EDITS)
    assert under.finished
    # The tables hold both rows, and the page of the run the one that is shown.
    [table] = tables(collect([tmp_path / "pruned"]), protocols=[TOKENS])
    assert [name for name, _ in table.rows] == ["unedited", "FT + PRUNE", "FT"]


def test_what_has_nothing_beneath_says_so(data: Path, corpus_path: Path, tmp_path: Path) -> None:
    config = run_config(data, corpus_path, policy="nas", beneath=True)
    with pytest.raises(NotApplicable, match="nothing is beneath the policy nas"):
        experiments.start(config.model_copy(update={"model": "/no/such/model"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_values_of_single_edits_are_found_together(
    data: Path, corpus_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    theirs = Memit.targets

    def counting(self: Memit, bench: Workbench, edits: Sequence[Edit]) -> list[Target]:
        asked.append(len(edits))
        return theirs(self, bench, edits)

    monkeypatch.setattr(Memit, "targets", counting)
    experiments.start(run_config(data, corpus_path, policy="accumulate", single=True), tmp_path / "run")
    assert asked == [N_EDITS]
