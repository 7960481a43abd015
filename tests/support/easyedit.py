"""Scripts as they are written for EasyEdit, one for each method, and what their files mean in our settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from everedit import Editor
from everedit.compat.classes import hparams_class
from everedit.compat.easyedit import HyperParams
from tests.support import tiny
from tests.support.editing import home_town
from tests.support.training import TRAINED

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
    """Return what a method keeps beside the weights."""
    return dict(editor.state().method.tensors)
