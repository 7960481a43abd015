"""Scripts written for EasyEdit: the same weights as our own interface, bit for bit, and the metrics they expect."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from everedit import Corpus, Editor
from everedit.compat import classes, easyedit
from everedit.compat.classes import hparams_class
from everedit.compat.easyedit import (
    BaseEditor,
    CompatibilityWarning,
    CounterFactDataset,
    HyperParams,
    MEMITHyperParams,
    ROMEHyperParams,
    ZsreDataset,
    summary_metrics,
)
from everedit.edit import Edit
from everedit.errors import EditError, EvereditError, ModelError, NotApplicable, UnknownName
from everedit.evaluation.read import read
from everedit.methods import method_names
from tests.support import tiny
from tests.support.editing import home_town, make_editor, probes
from tests.support.loading import bits, fresh, hooks_left, same_bits, shared
from tests.support.training import TRAINED

pytestmark = pytest.mark.usefixtures("own_cache")

EDITS = [home_town(person) for person in (0, 10)]
TEXTS = {
    "prompts": [edit.prompt for edit in EDITS],
    "target_new": [edit.target_new for edit in EDITS],
    "subject": [edit.subject for edit in EDITS],
}
MODULES = {"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "lm_head_module": "transformer.wte", "device": 0}
VALUES = {"v_lr": "5e-1", "v_num_grad_steps": 16, "v_weight_decay": 0, "clamp_norm_factor": 10, "kl_factor": 0}
TARGET = {"lr": 0.5, "steps": 16, "weight_decay": 0, "clamp": 10, "kl": 0}
CONTEXTS = {"context_template_length_params": [[6, 2]], "mom2_adjustment": True, **MODULES, **VALUES}
SPREAD = {"layers": [0, 1], "mom2_update_weight": 0.01, **MODULES, **VALUES}
ONE = {"layer": 1, "target": TARGET, "contexts": [[6, 2]]}
MANY = {"layers": [0, 1], "target": TARGET}
TUNED = {"layers": [1], "num_steps": 25, "batch_size": 3, "lr": "1e-2", "weight_decay": 0, "kl_factor": 0}
SHORT = {"method_settings": {"contexts": [[6, 2]]}}

# Algorithm: its file in EasyEdit's words, and by hand the method and settings of ours that it means.
SCRIPTS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ROME": ({"layers": [1], **CONTEXTS}, "rome", ONE),
    "ROME without statistics": (
        {"layers": [1], **CONTEXTS, "mom2_adjustment": False}, "rome", {**ONE, "second_moments": False}
    ),
    "R-ROME": ({"layers": [1], **CONTEXTS}, "r-rome", ONE),
    "WilKE": (
        {"layers": [], "scanning_ceiling": 2, **CONTEXTS}, "wilke",
        {"layers": [0, 1], "target": TARGET, "contexts": [[6, 2]]},
    ),
    "MEMIT": (SPREAD, "memit", {**MANY, "moment_weight": 0.01}),
    "PMET": ({**SPREAD, "nll_loss_factor": 1}, "pmet", {**MANY, "moment_weight": 0.01}),
    "EMMET": (
        {**SPREAD, "mom2_update_weight": 10, "emmet_lambda": 0.1}, "emmet",
        {**MANY, "moment_scale": 10, "ridge": 0.1, "ridge_for_one": True},
    ),
    "AlphaEdit": (
        {**SPREAD, "nullspace_threshold": "5e-2", "L2": 0.01, "P_loc": "null_space_project.pt"}, "alphaedit",
        {**MANY, "threshold": 0.05, "ridge": 0.01},
    ),
    "RLSEdit": ({**SPREAD, "mu": 1.0}, "rlsedit", {**MANY, "moment_weight": 0.01, "mu": 1.0}),
    "FT": (
        {**TUNED, "norm_constraint": False, "objective_optimization": "prompt_last"}, "ft",
        {"layers": [1], "steps": 25, "lr": 0.01, "rows_a_step": 3},
    ),
    "FT-L": (
        {**TUNED, "norm_constraint": "2e-1", "objective_optimization": "prompt_last"}, "ft-l",
        {"layers": [1], "steps": 25, "lr": 0.01, "rows_a_step": 3, "box": 0.2},
    ),
    "FT-M": (
        {**TUNED, "norm_constraint": False, "objective_optimization": "target_new"}, "ft-m",
        {"layers": [1], "steps": 25, "lr": 0.01, "rows_a_step": 3},
    ),
    "LoRA": (
        {"lora_type": "adalora", "layers": [], "num_steps": 20, "lr": "3e-3", "rank": 4, "lora_alpha": 16,
         "lora_dropout": 0.1, "target_modules": ["c_attn"], "norm_constraint": False},
        "lora", {"steps": 20, "lr": 3e-3, "rank": 4, "alpha": 16, "dropout": 0.1, "modules": ["c_attn"]},
    ),
    "UltraEdit": (
        {"inner_params": ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"], "lr": "2.5e-3", "token": "mask",
         "batch_size": 10, "batch_size_once": 10, "editor_batch_size": 1024, "dropout": 0.0, "half": False},
        "ultraedit", {"modules": {"mlp_out": [1, 2]}, "eta": 2.5e-3, "positions": "all", "chunk": 10},
    ),
    "KN": (
        {"steps": 10, "adaptive_threshold": 0.1, "p": 0.4, "refine": False, "lr_scale": 1.0, "n_toks": 10}, "kn",
        {"steps": 10, "threshold": 0.1, "share": 0.4},
    ),
    "GRACE": (
        {"inner_params": ["transformer.h[1].mlp.c_fc.weight"], "edit_lr": 0.2, "n_iter": 20, "eps": 1.0,
         "dist_fn": "euc", "val_init": "cold", "replacement": "replace_last", "eps_expand": "coverage", "num_pert": 8},
        "grace", {"layer": 1, "lr": 0.2, "steps": 20, "radius": 1.0},
    ),
    "WISE": (
        {"inner_params": ["transformer.h[2].mlp.c_fc.weight"], "edit_lr": 1.0, "n_iter": 10, "mask_ratio": 0.2,
         "act_margin": [0.1, 0.5, 0.3], "act_ratio": 0.88, "save_freq": 1, "merge_freq": 2, "merge_alg": "ties",
         "densities": 0.53, "weights": 1.0, "norm_constraint": 1.0, "retrieve": False, "replay": False,
         "objective_optimization": "only_label", "everedit": SHORT},
        "wise", {"layer": 2, "lr": 1.0, "steps": 10, "density": 0.2, "margins": [0.1, 0.5, 0.3], "ratio": 0.88,
                 "shard_edits": 1, "shards": 2, "kept": 0.53, "box": 1.0, "contexts": [[6, 2]]},
    ),
    "MEMOIR": (
        {"inner_params": ["transformer.h[2].mlp.c_fc.weight"],
         "everedit": {"method_settings": {"contexts": [[6, 2]], "steps": 10, "background": 20}}},
        "memoir", {"layer": 2, "contexts": [[6, 2]], "steps": 10, "background": 20},
    ),
    "T-Patcher": (
        {"everedit": {"method_settings": {"memory": 200, "steps": 40, "first_check": 20}}}, "t-patcher",
        {"memory": 200, "steps": 40, "first_check": 20},
    ),
    "CaliNet": (
        {"inner_params": ["transformer.h[2].mlp.c_fc.weight"],
         "everedit": {"method_settings": {"contexts": [[6, 2]], "slots": 8, "steps": 10}}},
        "calinet", {"layer": 2, "contexts": [[6, 2]], "slots": 8, "steps": 10},
    ),
    "IKE": (
        {"k": 16, "use_icl_examples": False, "results_dir": "./results"}, "ike",
        {"k": 0, "scope": -1.0, "order": "descending", "self_copy": False},
    ),
    **{name.upper(): ({"archive": "CHECKPOINT", "lr": "1e-6"}, name, {}) for name in TRAINED},
}  # fmt: skip


def hparams_of(algorithm: str, values: dict[str, Any], corpus: Path, folder: Path, checkpoint: str = "") -> HyperParams:
    """Read a script's file: EasyEdit's keys, the model's folder, and where our statistics come from."""
    name = algorithm.split(" ")[0]
    own = {"stats": {"corpus": str(corpus), "tokens": 4096, "window_tokens": 64}, "device": "cpu"}
    written = {**values, "alg_name": name, "model_name": str(tiny.trained("gpt2"))}
    written["everedit"] = {**own, **values.get("everedit", {})}
    if "archive" in values:
        written["archive"] = checkpoint
    (folder / "gpt2.yaml").write_text(yaml.safe_dump(written), encoding="utf-8")
    return hparams_class(name).from_hparams(str(folder / "gpt2"))


def memory_bits(editor: Editor) -> dict[str, torch.Tensor]:
    return dict(editor.state().method.tensors)


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
    assert {method for _, method, _ in SCRIPTS.values()} == set(method_names())


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


# --------------------------------------------------------------------------- metrics


def full(index: int) -> dict[str, Any]:
    """EasyEdit's arguments for the first edits, with a locality key of two prompts and one that is missing once."""
    [one, other] = probes()
    return {
        **TEXTS,
        "rephrase_prompts": [f"Yes. {prompt}" for prompt in TEXTS["prompts"]],
        "locality_inputs": {
            "neighborhood": {"prompt": [one.prompt, other.prompt], "ground_truth": [one.answer, other.answer]},
            "distracting": {
                "prompt": [[one.prompt, other.prompt], None],
                "ground_truth": [[one.answer, other.answer], None],
            },
        },
        "portability_inputs": {
            "one_hop": {"prompt": [other.prompt, one.prompt], "ground_truth": [[other.answer, "x"], one.answer]}
        },
        "ground_truth": ["Cairo", "Lima"],
    }


def test_the_nested_metrics_are_our_scorers(rome: BaseEditor) -> None:
    metrics, _, _ = rome.edit(**full(0), sequential_edit=True)
    row = metrics[0]
    assert {"pre", "post", "final", "case_id", "requested_rewrite", "time"} == row.keys()
    assert row["post"]["rewrite_acc"] == [1.0]
    assert row["pre"]["rewrite_acc"][0] < 1
    assert row["post"]["locality"].keys() == {
        "neighborhood_acc", "neighborhood_output", "distracting_acc", "distracting_output"
    }  # fmt: skip
    assert len(row["post"]["locality"]["distracting_acc"]) == 2
    assert "distracting_acc" not in metrics[1]["post"]["locality"]
    assert row["pre"]["locality"]["neighborhood_acc"] == [1.0]
    assert row["post"]["portability"].keys() == {"one_hop_acc"}
    # Found a second time: first choices of the edited and of the unedited model, token by token.
    [one, _] = probes()
    pairs = [(one.prompt, one.answer), (f"Yes. {EDITS[0].prompt}", EDITS[0].target_new)]
    base, final = read(shared("gpt2"), pairs), read(rome.lm, pairs)
    assert row["final"]["locality"]["neighborhood_output"] == [list(final[0].predicted)]
    same = [a == b for a, b in zip(final[0].predicted, base[0].predicted, strict=True)]
    assert row["final"]["locality"]["neighborhood_acc"] == [sum(same) / len(same)]
    right = [a == b for a, b in zip(final[1].predicted, final[1].target, strict=True)]
    assert row["final"]["rephrase_acc"] == [sum(right) / len(right)]
    json.dumps(metrics)


def test_every_metric_names_its_protocol(rome: BaseEditor) -> None:
    metrics, _, _ = rome.edit(**full(0), sequential_edit=True)
    told = metrics[0]["post"]["metric_meta"]
    assert told.keys() == {
        "rewrite", "rephrase", "locality.neighborhood", "locality.distracting", "portability.one_hop"
    }  # fmt: skip
    assert {about["protocol"] for about in told.values()} == {"teacher-forced/token-accuracy@1"}
    assert told["rewrite"]["result_key"] == "rewrite_acc"
    assert told["locality.neighborhood"]["against"] == "unedited model"
    scored = [metrics[0][phase]["metric_meta"]["rewrite"]["scored"] for phase in ("pre", "post", "final")]
    assert scored == ["before the edits", "right after the edit", "after all edits"]


def test_locality_is_measured_against_the_unedited_model_in_later_calls(rome: BaseEditor) -> None:
    [one, _] = probes()
    inputs = {"n": {"prompt": [one.prompt], "ground_truth": [one.answer]}}
    rome.edit(**TEXTS, sequential_edit=True)
    first = {name: texts[:1] for name, texts in TEXTS.items()}
    metrics, _, _ = rome.edit(**first, locality_inputs=inputs, sequential_edit=True)
    base = read(shared("gpt2"), [(one.prompt, one.answer)])[0].predicted
    for phase in ("pre", "final"):
        [said] = metrics[0][phase]["locality"]["n_output"]
        wanted = sum(a == b for a, b in zip(said, base, strict=True)) / len(base)
        assert metrics[0][phase]["locality"]["n_acc"] == [wanted]


def test_other_protocols_by_eval_metric(rome: BaseEditor) -> None:
    arguments = full(0)
    accuracy = rome.edit(**arguments)[0]
    for name in ("token em", "teacher-forced/token-accuracy@1"):
        assert rome.edit(**arguments, eval_metric=name)[0][0]["post"] == accuracy[0]["post"]
    written = rome.edit(**arguments, eval_metric="free-generation/exact-match@1")[0][0]["post"]
    assert written["metric_meta"]["rewrite"]["protocol"] == "free-generation/exact-match@1"
    assert isinstance(written["locality"]["neighborhood_gen_content"][0], str)
    perplexity = rome.edit(**arguments, eval_metric="ppl")[0][1]["post"]
    loss = read(rome.lm, [(EDITS[1].prompt, EDITS[1].target_new)])[0].nll
    assert perplexity["rewrite_ppl"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert perplexity["metric_meta"]["rewrite"]["protocol"] == "teacher-forced/perplexity@1"
    assert perplexity["metric_meta"]["locality.neighborhood"]["protocol"] == "teacher-forced/token-accuracy@1"
    rome.hparams.evaluation_type = "LLM-judge"
    judged = rome.edit(**arguments)[0][0]["post"]
    assert judged["metric_meta"]["rewrite"]["protocol"] == "free-generation/exact-match@1"
    with pytest.raises(UnknownName, match=r"eval_metric 'token_me'.*\n.*token_em"):
        rome.edit(**arguments, eval_metric="token_me")


def test_the_summary_is_the_mean_over_edits(rome: BaseEditor) -> None:
    metrics, _, _ = rome.edit(**full(0), sequential_edit=True)
    means = summary_metrics(metrics)
    both = [row["post"]["rephrase_acc"][0] for row in metrics]
    assert means["post"]["rephrase_acc"] == sum(both) / 2
    # Each edit counts once, and one without the key not at all.
    distracting = metrics[0]["post"]["locality"]["distracting_acc"]
    assert means["post"]["locality"]["distracting_acc"] == sum(distracting) / 2
    assert means.keys() == {"pre", "post", "final"}
    assert summary_metrics(metrics[0])["pre"]["rewrite_acc"] == metrics[0]["pre"]["rewrite_acc"][0]


# --------------------------------------------------------------------------- texts from elsewhere


def test_wise_takes_its_unrelated_texts_from_loc_prompts(corpus_path: Path, tmp_path: Path) -> None:
    values = SCRIPTS["WISE"][0]
    texts = ["nq question: who sings the song we had at noon Mira Quell", "the harbour was quiet all evening"]
    editor = BaseEditor.from_hparams(hparams_of("WISE", values, corpus_path, tmp_path))
    editor.edit(**TEXTS, loc_prompts=texts, sequential_edit=True)
    pool = [{"prompt": text.rpartition(" ")[0], "target_new": text.rpartition(" ")[2]} for text in texts]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, pool)), encoding="utf-8")
    settings = {**SCRIPTS["WISE"][2], "irrelevant": str(tmp_path / "pool.jsonl")}
    ours = Editor(fresh("gpt2"), "wise", method_settings=settings)
    for edit in EDITS:
        ours.edit(edit, score=False)
    mine, theirs = memory_bits(ours), memory_bits(editor.editor)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = BaseEditor.from_hparams(hparams_of("WISE", values, corpus_path, tmp_path))
    other.edit(**TEXTS, sequential_edit=True)
    assert not torch.equal(memory_bits(other.editor)["done"], theirs["done"])


def test_ike_takes_its_demonstrations_from_train_ds(corpus_path: Path, tmp_path: Path) -> None:
    editor = BaseEditor.from_hparams(hparams_of("IKE", {"k": 2}, corpus_path, tmp_path))
    records = [
        {"prompt": f"The home town of {name} is", "target_new": place, "subject": name}
        for name, place in (("Ada Nyman", "Turku"), ("Ilse Bakker", "Gouda"), ("Rui Prata", "Faro"))
    ]
    editor.edit(**TEXTS, train_ds=records, sequential_edit=True)
    [speaker] = editor.lm.speakers(["The home town of Mira Lanner is"], [4])
    assert speaker.prompt.startswith("New Fact: The home town of")
    # As many as the tiny model's context has room for.
    assert any(record["prompt"] in speaker.prompt for record in records)
    assert "New Fact: The home town of Mira Lanner" in speaker.prompt


def test_data_sets_are_sequences_of_records(tmp_path: Path, rome: BaseEditor) -> None:
    zsre = [
        {"subject": "Mira Lanner", "src": "The home town of Mira Lanner", "alt": "Oslo", "answers": ["Cairo"],
         "rephrase": "Yes. The home town of Mira Lanner", "loc": "nq question: who sings", "loc_ans": "Corin"},
        {"src": "no answer", "alt": ""},
        {"subject": "Sabine Ingelby", "src": "The home town of Sabine Ingelby", "alt": "Kyoto", "answers": ["Lima"]},
    ]  # fmt: skip
    (tmp_path / "zsre.json").write_text(json.dumps(zsre), encoding="utf-8")
    dataset = ZsreDataset(str(tmp_path / "zsre.json"), size=2)
    assert (len(dataset), dataset[0]["target_new"], dataset[1]["subject"]) == (2, "Oslo", "Sabine Ingelby")
    assert [record["prompt"] for record in dataset[:1]] == [record["prompt"] for record in dataset][:1]
    assert dataset[0]["cond"] == "Cairo >> Oslo || The home town of Mira Lanner"
    assert dataset[0]["locality_ground_truth"] == "Corin"
    assert len(dataset.rejected) == 1
    reduced = [{"prompt": "a b", "target_new": "c", "locality_prompt": "d e", "locality_ground_truth": "f"}]
    (tmp_path / "cf.json").write_text(json.dumps(reduced), encoding="utf-8")
    assert CounterFactDataset(tmp_path / "cf.json")[0]["locality_prompt"] == "d e"
    metrics, _, _ = rome.edit_dataset(dataset, sequential_edit=True)
    assert [row["requested_rewrite"]["target_new"] for row in metrics] == ["Oslo", "Kyoto"]
    (tmp_path / "none.json").write_text("[]", encoding="utf-8")
    with pytest.raises(EditError, match="no record"):
        ZsreDataset(tmp_path / "none.json")
    with pytest.raises(EditError, match=r"ds\[0\]"):
        rome.edit_dataset(["a text"])


# --------------------------------------------------------------------------- bad input

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompts": []}, "prompts"),
    "targets": ({"target_new": ["Oslo"]}, "target_new has 1 entries and prompts has 2"),
    "subjects": ({"subject": [*TEXTS["subject"], "Mira"]}, "subject has 3 entries"),
    "a text for two": ({"rephrase_prompts": "Yes."}, "rephrase_prompts has 1 entries"),
    "true answers": ({"ground_truth": []}, "ground_truth has 0 entries"),
    "locality": ({"locality_inputs": {"n": {"prompt": ["a"], "ground_truth": ["b"]}}}, r"locality_inputs\['n'\]"),
    "locality answers": ({"locality_inputs": {"n": {"prompt": ["a", "b"]}}}, "needs prompt and ground_truth"),
    "uneven probes": (
        {"portability_inputs": {"p": {"prompt": [["a", "b"], "c"], "ground_truth": [["x"], "y"]}}}, "2 prompts and 1"
    ),
    "empty answer": ({"locality_inputs": {"n": {"prompt": ["a", "b"], "ground_truth": ["x", ""]}}}, r"prompts\[1\]"),
    "no subject": ({"subject": None}, "rome needs the subject of every prompt"),
    "one subject missing": ({"subject": [TEXTS["subject"][0], None]}, r"prompts\[1\] has none"),
    "a subject elsewhere": ({"subject": ["Mira Lanner", "Nobody"]}, "does not occur in the prompt"),
    "an empty target": ({"target_new": ["Oslo", ""]}, "target_new"),
    "too many texts": ({"loc_prompts": ["a b", "c d", "e f"]}, "loc_prompts"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_are_named_and_nothing_is_changed(
    kind: str, rome: BaseEditor, corpus_path: Path, tmp_path: Path
) -> None:
    change, said = BAD[kind]
    editor = rome
    if "loc_prompts" in change:
        editor = BaseEditor.from_hparams(hparams_of("WISE", SCRIPTS["WISE"][0], corpus_path, tmp_path))
    before = bits(editor.lm)
    with pytest.raises(EditError, match=said):
        editor.edit(**{**TEXTS, **change}, sequential_edit=True)
    assert same_bits(editor.lm, before)
    assert memory_bits(editor.editor) == {}


def test_an_edit_that_fails_in_the_middle_takes_the_others_back(
    rome: BaseEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rome.edit(**{name: texts[:1] for name, texts in TEXTS.items()}, sequential_edit=True)
    before, edit, made = bits(rome.lm), rome.editor.edit, []

    def failing(edits: Any, **options: Any) -> Any:
        made.append(edits)
        if len(made) == 2:
            raise EditError(what="it cannot be made")
        return edit(edits, **options)

    monkeypatch.setattr(rome.editor, "edit", failing)
    with pytest.raises(EditError, match="cannot be made"):
        rome.edit(**TEXTS, sequential_edit=True)
    assert same_bits(rome.lm, before)


def test_unknown_arguments_get_a_warning_with_the_near_name(rome: BaseEditor) -> None:
    with pytest.warns(CompatibilityWarning, match="did you mean loc_prompts") as heard:
        rome.edit(**TEXTS, loc_promts=["a b"], verbose=False, test_generation=False, pre_file=None)
    assert [warning.filename for warning in heard] == [__file__]
    with pytest.warns(CompatibilityWarning, match="fluency") as heard:
        rome.edit(**TEXTS, test_generation=True)
    assert [warning.filename for warning in heard] == [__file__]


MODELS: list[tuple[Callable[[], HyperParams], str]] = [
    (partial(ROMEHyperParams, layers=[1]), "name no model"),
    (partial(ROMEHyperParams, model_name="./hugging_cache/gpt2-xl"), "model_name"),
    (partial(ROMEHyperParams, model_name="smollm2-135"), "did you mean smollm2-135m"),
]


@pytest.mark.parametrize(("make", "said"), MODELS)
def test_a_model_that_is_not_there(make: Callable[[], HyperParams], said: str) -> None:
    with pytest.raises((EditError, ModelError, UnknownName), match=said):
        BaseEditor.from_hparams(make())


def test_a_layer_that_is_not_there_changes_nothing(corpus_path: Path, tmp_path: Path) -> None:
    hparams = hparams_of("MEMIT", {**SPREAD, "layers": [3, 4]}, corpus_path, tmp_path)
    assert isinstance(hparams, MEMITHyperParams)
    with pytest.raises(EvereditError, match="no layer 4"):
        BaseEditor.from_hparams(hparams)


def test_every_public_name_is_there() -> None:
    assert all(hasattr(easyedit, name) for name in easyedit.__all__)
    assert {kind.__name__ for kind in classes.CLASSES} <= set(easyedit.__all__)
    assert Edit.__name__ not in easyedit.__all__
