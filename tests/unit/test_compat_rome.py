"""Requests as ROME's and MEMIT's code writes them, and the functions that apply them to a model in place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from everedit.compat.easyedit import BaseEditor, CounterFactDataset, GraceHyperParams
from everedit.compat.requests import as_request, edits_from_requests
from everedit.compat.rome import MEMITHyperParams, ROMEHyperParams, apply_memit_to_model, apply_rome_to_model
from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.errors import EditError
from everedit.models import load_model
from tests.support import tiny
from tests.support.editing import home_town, make_editor
from tests.support.loading import bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

EDITS = [home_town(person) for person in (0, 10)]
VALUES = {
    "fact_token": "subject_last", "v_num_grad_steps": 16, "v_lr": 5e-1, "v_loss_layer": 3, "v_weight_decay": 0,
    "clamp_norm_factor": 10, "kl_factor": 0, "mom2_adjustment": True, "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100_000, "mom2_dtype": "float32", "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
}  # fmt: skip
TARGET = {"lr": 0.5, "steps": 16, "weight_decay": 0, "clamp": 10, "kl": 0}
REWRITES = {
    "rome": ({"layers": [1], "context_template_length_params": [[6, 2]], **VALUES}, ROMEHyperParams,
             apply_rome_to_model, {"layer": 1, "contexts": [[6, 2]], "target": TARGET}),
    "memit": ({"layers": [0, 1], "mom2_update_weight": 0.01, **VALUES}, MEMITHyperParams,
              apply_memit_to_model, {"layers": [0, 1], "moment_weight": 0.01, "target": TARGET}),
}  # fmt: skip


def rewrite(edit: Edit) -> dict[str, Any]:
    """An edit as ROME's request: its subject taken out of its prompt."""
    assert edit.subject is not None
    return {
        "prompt": edit.prompt.replace(edit.subject, "{}"),
        "subject": edit.subject,
        "target_new": {"str": edit.target_new, "id": "Q1"},
        "target_true": {"str": "Cairo", "id": "Q2"},
        "relation_id": "P19",
    }


def loaded() -> tuple[Any, Any]:
    folder = tiny.trained("gpt2")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("method", REWRITES)
@pytest.mark.parametrize("copied", [False, True])
def test_requests_and_json_files_make_the_weights_of_our_own_interface(
    method: str, copied: bool, corpus_path: Path, tmp_path: Path
) -> None:
    values, kind, apply, settings = REWRITES[method]
    (tmp_path / "gpt2.json").write_text(json.dumps(values), encoding="utf-8")
    hparams = kind.from_json(tmp_path / "gpt2.json")
    hparams.everedit = {"stats": {"corpus": str(corpus_path), "tokens": 4096, "window_tokens": 64}}
    model, tok = loaded()
    edited, originals = apply(
        model, tok, [rewrite(edit) for edit in EDITS], hparams, copy=copied, return_orig_weights=True
    )
    ours = make_editor("gpt2", corpus_path, method, method_settings=settings)
    ours.edit(EDITS, score=False)
    state, unedited = edited.state_dict(), bits(shared("gpt2"))
    assert all(torch.equal(state[name], tensor) for name, tensor in bits(ours.lm).items())
    assert (edited is model) != copied
    if copied:
        assert all(torch.equal(tensor, unedited[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in unedited.items() if not torch.equal(tensor, state[name])}
    assert originals.keys() == changed
    assert all(torch.equal(originals[name], unedited[name]) for name in changed)
    assert apply(model, tok, [rewrite(EDITS[0])], hparams, copy=True)[1] == {}


def test_a_request_that_cannot_be_made_leaves_the_model_alone(corpus_path: Path) -> None:
    values, kind, apply, _ = REWRITES["rome"]
    model, tok = loaded()
    before = copy.deepcopy(model.state_dict())
    requests = [rewrite(EDITS[0]), {"prompt": "The home town of Mira", "target_new": "Oslo"}]
    with pytest.raises(EditError, match="subject"):
        apply(model, tok, requests, kind(**values))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_requests_of_three_kinds_are_the_same_edit(tmp_path: Path) -> None:
    edit = EDITS[0]
    record = {
        "case_id": 7, "requested_rewrite": rewrite(edit), "paraphrase_prompts": ["Rain. A\nb", "c"],
        "neighborhood_prompts": ["d", "e"], "generation_prompts": ["f"],
    }  # fmt: skip
    full, theirs, plain = edits_from_requests(
        [record, rewrite(edit), {"prompt": edit.prompt, "subject": edit.subject, "target_new": edit.target_new}]
    )
    assert full.id == theirs.id == plain.id == edit.id
    assert (full.ground_truth, full.relation, full.record) == ("Cairo", "P19", "7")
    assert [(probe.prompt, probe.answer) for probe in full.locality] == [("d", "Cairo"), ("e", "Cairo")]
    assert full.rephrase == ("Rain. A\nb", "c")
    # The same records as a data set, and there and back as EasyEdit's request.
    (tmp_path / "cf.json").write_text(json.dumps([record]), encoding="utf-8")
    assert load_edits("counterfact_full", tmp_path / "cf.json").edits == [full]
    assert CounterFactDataset(tmp_path / "cf.json").edits == [full]
    [again] = edits_from_requests([as_request(full)])
    assert (again.locality, again.rephrase, again.ground_truth) == (full.locality, full.rephrase, full.ground_truth)


BAD: list[tuple[dict[str, Any], str]] = [
    ({**rewrite(EDITS[0]), "prompt": "The home town of Mira Lanner"}, r"requests\[0\].*\n.*\{\}"),
    ({"prompt": "The town of {}", "target_new": {"str": "Oslo"}}, "lacks 'subject'"),
    ({"prompt": "The town of {}", "subject": "Ada", "target_new": {"id": "Q1"}}, "lacks 'str'"),
    ({"prompt": "The town of {}", "subject": 3, "target_new": {"str": "Oslo"}}, "lacks"),
    ({"requested_rewrite": [rewrite(EDITS[0])]}, "no place for its subject"),
    ({"prompt": "The town of Ada"}, "'target_new' is missing"),
    ({"target_new": "Oslo"}, "'prompt' is missing"),
    ({"prompt": "a", "target_new": "b", "locality": {"n": {"prompt": "c"}}}, "locality"),
]


@pytest.mark.parametrize(("request_", "said"), BAD)
def test_a_bad_request_is_named(request_: dict[str, Any], said: str) -> None:
    with pytest.raises(EditError, match=said) as error:
        edits_from_requests([request_])
    assert "requests[0]" in str(error.value)


REAL: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "ROME": (
        ROMEHyperParams(layers=[14], v_num_grad_steps=4, v_lr="5e-1", v_weight_decay="1e-3", kl_factor=0,
                        mom2_adjustment=False, clamp_norm_factor=4, context_template_length_params=[[5, 2]]),
        "rome", {"layer": 14, "contexts": [[5, 2]], "second_moments": False,
                 "target": {"steps": 4, "lr": 0.5, "weight_decay": 1e-3, "kl": 0, "clamp": 4}},
    ),
    "GRACE": (
        GraceHyperParams(inner_params=["model.layers[25].mlp.down_proj.weight"], n_iter=4, edit_lr=1.0, eps=1.0),
        "grace", {"layer": 25, "steps": 4, "lr": 1.0, "radius": 1.0},
    ),
}  # fmt: skip


@pytest.mark.real
def test_a_real_models_weights_are_those_of_our_own_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVEREDIT_CACHE")
    edit = Edit(prompt="The capital of Australia is", subject="Australia", target_new="Lisbon")
    lm = load_model("smollm2-135m", device="cpu")
    for hparams, method, settings in REAL.values():
        hparams.model_name = (lm.model, lm.tokenizer)
        editor = BaseEditor.from_hparams(hparams)
        metrics, model, _ = editor.edit(edit.prompt, edit.target_new, "Canberra", subject=edit.subject)
        theirs = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        memory = editor.editor.state().method.tensors
        assert metrics[0]["pre"] != metrics[0]["post"]
        editor.editor.reset()
        ours = Editor(lm, method, method_settings=settings)
        ours.edit(edit, score=False)
        mine = ours.state().method.tensors
        assert all(torch.equal(theirs[name], tensor) for name, tensor in lm.model.state_dict().items())
        assert all(torch.equal(memory[name], tensor) for name, tensor in mine.items())
        ours.reset()
