"""Scripts written for EasyEdit make the weights of our own interface, bit for bit: single edits, streams, batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from everedit import Corpus, Editor
from everedit.compat.easyedit import BaseEditor
from everedit.errors import EditError, NotApplicable
from everedit.methods import method_names
from tests.support import tiny
from tests.support.easyedit import EDITS, MANY, ONE, SCRIPTS, SPREAD, TEXTS, hparams_of, memory_bits
from tests.support.editing import make_editor
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared
from tests.support.training import TRAINED

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("algorithm", SCRIPTS)
def test_a_script_makes_the_weights_of_our_own_interface(algorithm: str, corpus_path: Path, tmp_path: Path) -> None:
    values, method, settings = SCRIPTS[algorithm]
    if method in TRAINED:
        # Trained by the support of the tests; its folder is the checkpoint.
        settings = {"checkpoint": make_editor("gpt2", corpus_path, method).method.config.checkpoint}  # type: ignore[attr-defined]
    hparams = hparams_of(algorithm, values, corpus_path, tmp_path, str(settings.get("checkpoint")))
    editor = BaseEditor.from_hparams(hparams)
    metrics, edited_model, weights = editor.edit(**TEXTS, sequential_edit=True)
    ours = Editor(fresh("gpt2"), method, method_settings=settings, corpus=Corpus(corpus_path, 4096, 64))
    for edit in EDITS:
        ours.edit(edit, score=False)
    assert (editor.editor.method.name, edited_model) == (method, editor.model)
    assert same_bits(editor.lm, bits(ours.lm))
    mine, theirs = memory_bits(ours), memory_bits(editor.editor)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    # Something happened: weights or memories differ from the unedited model's.
    unedited = bits(shared("gpt2"))
    changed = [name for name, tensor in bits(ours.lm).items() if not torch.equal(tensor, unedited[name])]
    assert bool(changed) != bool(mine and ours.method.traits.changes != "weights")
    assert len(metrics) == 2
    if callable(weights):
        assert mine
        weights()
        assert memory_bits(editor.editor) == {}
        assert hooks_left(editor.lm) == []
    else:
        assert sorted(weights) == sorted(changed)
        assert all(torch.equal(weights[name], unedited[name]) for name in weights)


def test_there_is_a_script_for_every_method() -> None:
    # Marginalia is Everedit's own.
    assert {method for _, method, _ in SCRIPTS.values()} == set(method_names()) - {"marginalia"}


# --------------------------------------------------------------------------- one edit by itself, or a stream


@pytest.fixture
def rome(corpus_path: Path, tmp_path: Path) -> BaseEditor:
    return BaseEditor.from_hparams(hparams_of("ROME", SCRIPTS["ROME"][0], corpus_path, tmp_path))


@pytest.fixture
def memit(corpus_path: Path, tmp_path: Path) -> BaseEditor:
    return BaseEditor.from_hparams(hparams_of("MEMIT", {**SPREAD, "batch_size": 2}, corpus_path, tmp_path))


def test_edits_by_themselves_start_from_the_unedited_model(rome: BaseEditor, corpus_path: Path) -> None:
    metrics, model, weights = rome.edit(**TEXTS)
    alone = make_editor("gpt2", corpus_path, "rome", method_settings=ONE)
    alone.edit(EDITS[1], score=False)
    # The model that comes back holds the last edit, and that alone.
    assert same_bits(rome.lm, bits(alone.lm))
    assert all("final" not in row for row in metrics)
    [name] = weights
    model.get_parameter(name).data.copy_(weights[name])
    assert same_bits(rome.lm, bits(shared("gpt2")))
    again, _, _ = rome.edit(**TEXTS)
    assert [row["post"] for row in again] == [row["post"] for row in metrics]
    assert [row["pre"] for row in again] == [row["pre"] for row in metrics]


def test_a_stream_goes_on_in_the_next_call(rome: BaseEditor, corpus_path: Path) -> None:
    first = {name: texts[:1] for name, texts in TEXTS.items()}
    second = {name: texts[1:] for name, texts in TEXTS.items()}
    rome.edit(**first, sequential_edit=True)
    # An edit by itself leaves no trace in the stream.
    rome.edit("The home town of Corin Vane", "Lisbon", subject="Corin Vane")
    metrics, _, weights = rome.edit(**second, keep_original_weight=False)
    ours = make_editor("gpt2", corpus_path, "rome", method_settings=ONE)
    ours.edit(EDITS[0], score=False)
    between = bits(ours.lm)
    ours.edit(EDITS[1], score=False)
    assert same_bits(rome.lm, bits(ours.lm))
    assert all(torch.equal(weights[name], between[name]) for name in weights)  # type: ignore[index]
    assert metrics[0]["final"].keys() == metrics[0]["post"].keys()
    with pytest.raises(EditError, match="keep_original_weight"):
        rome.edit(**TEXTS, sequential_edit=True, keep_original_weight=True)


def test_a_batch_is_made_together(memit: BaseEditor, corpus_path: Path) -> None:
    memit.batch_edit(**TEXTS)
    ours = make_editor("gpt2", corpus_path, "memit", method_settings={**MANY, "moment_weight": 0.01})
    ours.edit(EDITS, score=False)
    assert same_bits(memit.lm, bits(ours.lm))


def test_a_method_without_batches(corpus_path: Path, tmp_path: Path) -> None:
    values = {**SCRIPTS["ROME"][0], "batch_size": 2}
    editor = BaseEditor.from_hparams(hparams_of("ROME", values, corpus_path, tmp_path))
    with pytest.raises(NotApplicable, match="one edit at a time"):
        editor.batch_edit(**TEXTS)
    assert same_bits(editor.lm, bits(shared("gpt2")))


def test_a_policy_comes_with_the_hyper_parameters(corpus_path: Path, tmp_path: Path) -> None:
    own = {"policy": "simie", "policy_settings": {"lam": 1e-4}}
    values = {**SCRIPTS["ROME"][0], "everedit": own}
    editor = BaseEditor.from_hparams(hparams_of("ROME", values, corpus_path, tmp_path))
    editor.edit(**TEXTS, sequential_edit=True)
    ours = make_editor("gpt2", corpus_path, "rome", "simie", method_settings=ONE, policy_settings={"lam": 1e-4})
    for edit in EDITS:
        ours.edit(edit, score=False)
    assert same_bits(editor.lm, bits(ours.lm))


def test_the_edited_model_is_a_plain_one_that_can_be_saved(rome: BaseEditor, tmp_path: Path) -> None:
    _, model, _ = rome.edit(**TEXTS, sequential_edit=True)
    model.save_pretrained(tmp_path / "edited")
    rome.tok.save_pretrained(tmp_path / "edited")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    ids = tokenizer(EDITS[0].prompt, return_tensors="pt").input_ids
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    said = tokenizer.decode(loaded.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :])
    assert EDITS[0].target_new.split()[0] in said
    assert hooks_left(rome.lm) == []


def test_a_loaded_pair_is_edited_in_place(corpus_path: Path, tmp_path: Path, rome: BaseEditor) -> None:
    folder = tiny.trained("gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hparams = hparams_of("ROME", SCRIPTS["ROME"][0], corpus_path, tmp_path)
    hparams.model_name = (model, AutoTokenizer.from_pretrained(folder))
    _, edited, _ = BaseEditor.from_hparams(hparams).edit(**TEXTS, sequential_edit=True)
    rome.edit(**TEXTS, sequential_edit=True)
    assert edited is model
    assert same_bits(rome.lm, dict(model.state_dict()))
