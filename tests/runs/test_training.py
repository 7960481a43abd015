"""``everedit train``'s loop: killed and gone on with it ends the same, and what is wrong is said before it is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit import training
from everedit.editor import Editor
from everedit.errors import EditError, NotApplicable, NumericalError
from everedit.methods.mend import Mend
from everedit.patch import load_tensors
from everedit.training import TrainConfig
from tests.support import tiny
from tests.support.editing import home_town, losses, probes
from tests.support.loading import bits, fresh, same_bits
from tests.support.training import TRAINED

pytestmark = pytest.mark.usefixtures("own_cache")
STEPS, PART = 24, 8

KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from everedit import training
from everedit.reporting import Silent

class Deadly(Silent):
    def step(self, done, note=""):
        if done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

training.train(training.TrainConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]), reporter=Deadly())
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "edits.jsonl"
    edits = [home_town(person, locality=probes()) for person in range(8)]
    rows = (json.dumps(edit.model_dump(mode="json", exclude_defaults=True)) for edit in edits)
    file.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return file


def config(data: Path, method: str = "mend", **more: Any) -> TrainConfig:
    values = {"steps": STEPS, "batch": 1, "accumulation": 2, "check_every": PART, "held_out": 2, "patience": 1000}
    own = {**TRAINED[method], **more.pop("method_settings", {})}
    model = str(tiny.trained("llama"))
    return TrainConfig(method=method, model=model, data=str(data), **{**values, **more}, method_settings=own)


@pytest.mark.parametrize("method", ["mend", "ke", "serac"])
@pytest.mark.parametrize("killed_at", [3, PART + 3])
def test_a_killed_training_ends_as_one_that_was_not(method: str, killed_at: int, data: Path, tmp_path: Path) -> None:
    chosen, whole, broken = config(data, method, steps=16), tmp_path / "whole", tmp_path / "broken"
    card = training.train(chosen, whole)
    arguments = [sys.executable, "-c", KILLED, chosen.model_dump_json(), str(broken), str(killed_at)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows(broken, "train")) >= killed_at
    again = training.resume(broken)
    assert {**again, "written": ""} == {**card, "written": ""}
    for file in ("networks.safetensors", "progress.safetensors"):
        mine, theirs = (load_tensors(folder / file)[0] for folder in (whole, broken))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert rows(broken, "train") == rows(whole, "train")
    assert len(rows(whole, "train")) == 16


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def test_training_helps_and_its_checkpoint_edits(data: Path, tmp_path: Path) -> None:
    lm = fresh("llama")
    before = bits(lm)
    card = training.train(config(data, steps=96), tmp_path / "out")
    validations = rows(tmp_path / "out", "validation")
    assert min(row["loss"] for row in validations) == card["validation"]["loss"] < validations[0]["loss"]
    # The checkpoint brings the settings that it was trained with.
    editor = Editor(lm, "mend", method_settings={"checkpoint": tmp_path / "out"})
    assert (editor.method.config.rank, editor.method.config.step) == (32, 1e-3)  # type: ignore[attr-defined]
    edit = home_town(0)
    unedited = losses(lm, [edit])[0]
    with editor.trial(edit, score=False):
        assert losses(lm, [edit])[0] < unedited - 1
    assert same_bits(lm, before)


def test_it_stops_when_nothing_gets_better(data: Path, tmp_path: Path) -> None:
    # SERAC keeps no statistics beside its networks: at this rate every validation gives the same loss.
    card = training.train(config(data, "serac", patience=PART, method_settings={"lr": 1e-30}), tmp_path / "out")
    assert card["step"] == PART
    assert rows(tmp_path / "out", "train")[-1]["step"] == 2 * PART


def test_a_loss_that_is_not_finite_names_its_batch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Mend.learner

    def broken(self: Mend, bench: Any) -> Any:
        learner = theirs(self, bench)
        learner.steps.data.fill_(float("nan"))
        return learner

    monkeypatch.setattr(Mend, "learner", broken)
    with pytest.raises(NumericalError, match=r"not finite at step 1; the batch is in offending_batch\.jsonl"):
        training.train(config(data), tmp_path / "out")
    [row] = (tmp_path / "out" / "offending_batch.jsonl").read_text().splitlines()
    assert json.loads(row)["prompt"].startswith("The home town of")


def test_what_cannot_be_trained_is_refused_before_anything_is_computed(data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt": "The home town of Mira Lanner", "target_new": "Oslo"}) + "\n")
    refused = [
        (config(data, check_every=5), "check_every is 5 and accumulation 2"),
        (config(data).model_copy(update={"method": "rome", "method_settings": {}}), "rome needs no training"),
        (config(bare), "too few records that mend can be trained on"),
    ]
    for chosen, message in refused:
        with pytest.raises(EditError, match=message):
            training.train(chosen, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_or_method_is_refused(data: Path, tmp_path: Path) -> None:
    training.train(config(data, steps=PART), tmp_path / "out")
    for family, method, part in (("mistral", "mend", "model"), ("llama", "ke", "method")):
        lm = fresh(family)
        before = bits(lm)
        with pytest.raises(NotApplicable, match=f"checkpoint is of another {part}"):
            Editor(lm, method, method_settings={"checkpoint": tmp_path / "out"}).edit(home_town(0), score=False)
        assert same_bits(lm, before)


def test_a_plan_says_what_a_training_takes_and_begins_none(data: Path) -> None:
    plan = training.plan_training(config(data))
    assert (plan.examples, plan.held_out, plan.steps) == (6, 2, STEPS)
    assert plan.parameters > 10_000
    assert plan.seconds_total > plan.seconds_a_step > 0
