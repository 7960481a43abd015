"""EasyEdit's training scripts on our trainer: the same checkpoint, resumed, and found by the file for editing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from everedit.compat.easyedit import (
    BaseEditor,
    CounterFactDataset,
    EditTrainer,
    MALMENTrainingHparams,
    MENDHyperParams,
    MENDTrainingHparams,
)
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.errors import EditError
from everedit.experiments.run import RunConfig
from everedit.training import TrainConfig, train
from tests.support import tiny
from tests.support.editing import home_town, probes
from tests.support.loading import bits, fresh, same_bits

pytestmark = pytest.mark.usefixtures("own_cache")

LOOP = {
    "alg": "MEND", "archive": None, "rank": 8, "lr": "1e-3", "edit_lr": "1e-3", "lr_lr": "1e-2", "cedit": 1.0,
    "cloc": 0.3, "max_iters": 6, "accumulate_bs": 2, "val_interval": 2, "batch_size": 2, "seed": 5, "grad_clip": 100.0,
    "early_stop_patience": 20, "early_stop_key": "loss/total_edit_val", "n_hidden": 1, "inner_params": [
        "transformer.h.2.mlp.c_fc.weight", "transformer.h.3.mlp.c_proj.weight"], "opt": "Adam", "half": False,
}  # fmt: skip


def edits(first: int, n: int) -> list[Edit]:
    return [
        home_town(person, rephrase=(f"Yes. {home_town(person).prompt}",), locality=probes()[:1])
        for person in range(first, first + n)
    ]


def written(path: Path, some: list[Edit]) -> Path:
    """CounterFact in EasyEdit's reduced form."""
    records = [
        {
            "prompt": edit.prompt, "target_new": edit.target_new, "subject": edit.subject,
            "rephrase_prompt": edit.rephrase[0], "locality_prompt": edit.locality[0].prompt,
            "locality_ground_truth": edit.locality[0].answer,
        }
        for edit in some
    ]  # fmt: skip
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def script(tmp_path: Path) -> dict[str, Any]:
    """A training script: its file of hyper-parameters, and its two data sets."""
    values = {**LOOP, "model_name": str(tiny.trained("gpt2")), "results_dir": str(tmp_path / "results")}
    (tmp_path / "mend.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return {
        "config": MENDTrainingHparams.from_hparams(tmp_path / "mend"),
        "train_set": CounterFactDataset(written(tmp_path / "train.json", edits(0, 8))),
        "val_set": CounterFactDataset(written(tmp_path / "val.json", edits(8, 3))),
    }


def networks(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "networks.safetensors")


def test_a_script_trains_the_networks_of_our_own_trainer(script: dict[str, Any], tmp_path: Path) -> None:
    trainer = EditTrainer(**script)
    card = trainer.run()
    assert trainer.folder == tmp_path / "results" / "models" / "MEND" / tiny.trained("gpt2").name
    config = TrainConfig(
        method="mend", model=str(tiny.trained("gpt2")), data="counterfact", data_path=tmp_path / "train.json",
        validation="counterfact", validation_path=tmp_path / "val.json", steps=6, accumulation=2, check_every=2,
        batch=2, seed=5, clip=100.0, patience=20, held_out=100,
        method_settings={"rank": 8, "lr": 1e-3, "step": 1e-3, "step_lr": 1e-2, "c_edit": 1.0, "c_loc": 0.3,
                         "blocks": 2, "layers": [2, 3]},
    )  # fmt: skip
    ours = train(config, tmp_path / "ours")
    mine, theirs = networks(tmp_path / "ours"), networks(trainer.folder)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (card["step"], card["validation"]) == (ours["step"], ours["validation"])
    # The file for editing finds the checkpoint by its archive, and edits with it as our own editor does.
    hparams = MENDHyperParams(
        alg_name="MEND", model_name=str(tiny.trained("gpt2")), archive=str(trainer.folder), rank=1920,
        everedit={"device": "cpu"},
    )  # fmt: skip
    editor = BaseEditor.from_hparams(hparams)
    edit = edits(0, 1)[0]
    editor.edit(edit.prompt, edit.target_new)
    by_hand = Editor(fresh("gpt2"), "mend", method_settings={"checkpoint": tmp_path / "ours"})
    by_hand.edit(edit, score=False)
    assert same_bits(editor.lm, bits(by_hand.lm))
    assert not same_bits(editor.lm, bits(fresh("gpt2")))


def test_a_training_goes_on_and_another_one_is_refused(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = EditTrainer(**script)
    whole = trainer.run()
    before = {file.name: file.read_bytes() for file in trainer.folder.iterdir()}
    # Done already: it is read back, and nothing is trained twice.
    assert EditTrainer(**script).run() == whole
    assert {file.name for file in trainer.folder.iterdir()} == before.keys()
    assert (trainer.folder / "networks.safetensors").read_bytes() == before["networks.safetensors"]
    script["config"].rank = 4
    with pytest.raises(EditError, match="results_dir holds another training"):
        EditTrainer(**script).run()


def test_without_a_validation_set_the_last_records_are_held_out(script: dict[str, Any]) -> None:
    script["config"].val_steps = 3
    trainer = EditTrainer(script["config"], script["train_set"])
    assert (trainer.config.validation, trainer.config.held_out) == (None, 3)
    # Plain dictionaries will do for a data set.
    records = [dict(record) for record in script["train_set"]]
    assert EditTrainer(script["config"], records).config.data != ""
    assert RunConfig.model_validate(script["config"].run_config()).method == "mend"


def test_bad_input_is_named_before_anything_is_trained(script: dict[str, Any], tmp_path: Path) -> None:
    script["config"].val_interval = 3
    with pytest.raises(EditError, match="multiple of accumulation"):
        EditTrainer(**script)
    script["config"].val_interval = 2
    with pytest.raises(EditError, match=r"train_set\[1\]"):
        EditTrainer(script["config"], [script["train_set"][0], {"prompt": "a", "locality_prompt": "b"}])
    with pytest.raises(EditError, match="token is 'ans'"):
        EditTrainer(MALMENTrainingHparams(token="ans", model_name="gpt2"), script["train_set"])
    assert not (tmp_path / "results").exists()
