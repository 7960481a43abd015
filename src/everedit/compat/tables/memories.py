"""Algorithms that remember beside the weights: GRACE, WISE, IKE and those that other code has no file for."""

from __future__ import annotations

from typing import Any

from everedit.compat.readers import choice, count, flag, layer_of_module, number, text
from everedit.compat.rules import Algorithm, Ignored, Mapped, Table
from everedit.compat.tables.common import COMMON

__all__ = ["ALGORITHMS"]

_ONE_LAYER: Table = {**COMMON, "inner_params": Mapped("method.layer", layer_of_module)}


def _margins(value: Any) -> list[float]:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError("three numbers: alpha, beta, gamma")
    return [number(part) for part in value]


def _shards(merge: Any, save: Any) -> int:
    if save is None or count(merge) % count(save):
        raise ValueError("a multiple of save_freq")
    return count(merge) // count(save)


def _demonstrations(value: Any) -> int | None:
    return None if flag(value) else 0


ALGORITHMS = (
    Algorithm(
        "GRACE",
        "grace",
        {
            **_ONE_LAYER,
            "edit_lr": Mapped("method.lr", number),
            "n_iter": Mapped("method.steps", count),
            "eps": Mapped("method.radius", number),
            "val_init": Mapped("method.start", choice({"cold": "cold", "warm": "warm"})),
            "replacement": Mapped(
                "method.replace", choice({"replace_last": "last", "replace_all": "all", "replace_prompt": "prompt"})
            ),
            "eps_expand": Mapped("method.expand", choice({"coverage": "coverage", "moving_average": "moving_average"})),
            "dist_fn": Ignored("distances are Euclidean", only=("euc",)),
            "val_train": Ignored("values are trained by gradient descent", only=("sgd",)),
            "val_reg": Ignored("values are not regularised", only=(None, "None")),
            "reg": Ignored("it is read by nothing"),
            "num_pert": Ignored("it is read by nothing"),
        },
    ),
    Algorithm(
        "WISE",
        "wise",
        {
            **_ONE_LAYER,
            "edit_lr": Mapped("method.lr", number),
            "n_iter": Mapped("method.steps", count),
            "mask_ratio": Mapped("method.density", number),
            "norm_constraint": Mapped("method.box", number),
            "act_margin": Mapped("method.margins", _margins),
            "act_ratio": Mapped("method.ratio", number),
            "save_freq": Mapped("method.shard_edits", count),
            "merge_freq": Mapped("method.shards", _shards, beside="save_freq"),
            "merge_alg": Ignored("shards are merged by TIES", only=("ties",)),
            "densities": Mapped("method.kept", number),
            "weights": Ignored("shards count alike", only=(1.0, None)),
            "retrieve": Mapped("method.memories", lambda value: "retrieve" if flag(value) else "merge"),
            "replay": Mapped("method.replay", flag),
            "objective_optimization": Ignored("the loss is that of the target alone", only=("only_label",)),
            "hidden_act": Ignored("the activation is the model's own"),
            "save_path": Ignored("everedit run saves its state after every edit"),
            "load_path": Ignored("everedit run --resume goes on where a run was interrupted"),
        },
    ),
    Algorithm(
        "IKE",
        "ike",
        {
            **COMMON,
            "k": Mapped("method.k", count),
            "use_icl_examples": Mapped("method.k", _demonstrations),
            "sentence_model_name": Mapped("method.encoder", text),
        },
        # EasyEdit's variant: the edit is put before every prompt, the nearest demonstration first, and no copy of it.
        always={"method.k": 16, "method.scope": -1.0, "method.order": "descending", "method.self_copy": False},
    ),
    Algorithm("MEMOIR", "memoir", _ONE_LAYER),
    Algorithm("T-Patcher", "t-patcher", _ONE_LAYER, spellings=("TPatcher", "T_Patcher")),
    Algorithm("CaliNet", "calinet", _ONE_LAYER),
)
