"""Algorithms that are trained first, as they edit and as they are trained: MEND, MALMEN, KE and SERAC."""

from __future__ import annotations

from typing import Any

from everedit.compat.readers import count, flag, folder, layers_of_modules, number, text
from everedit.compat.rules import Algorithm, Ignored, Mapped, Table
from everedit.compat.tables.common import COMMON, LOGGING

__all__ = ["ALGORITHMS"]

_TRAINED: Table = {
    **COMMON,
    **LOGGING,
    "archive": Mapped("method.checkpoint", folder),
    "inner_params": Mapped("method.layers", layers_of_modules),
    "lr": Mapped("method.lr", number),
    "batch_size": Mapped(("batch", "train.batch"), count),
    "max_iters": Mapped("train.steps", count),
    "accumulate_bs": Mapped("train.accumulation", count),
    "grad_clip": Mapped("train.clip", number),
    "val_interval": Mapped("train.check_every", count),
    "val_steps": Mapped("train.held_out", count),
    "early_stop_patience": Mapped("train.patience", count),
    "early_stop_key": Ignored("the loss of the validation decides"),
    "val_batch_size": Ignored("validation goes in batches of the training's size"),
    "opt": Ignored("the published optimiser is used", only=("Adam",)),
    "eval_only": Ignored("a training trains, and an edit reads its checkpoint"),
    "train_base": Ignored("the base model stays as it is", only=(False,)),
    "cbase": Ignored("the base model stays as it is, so that its loss has no weight"),
    "edit_lr": Ignored("it is read by nothing"),
    "lr_lr": Ignored("it is read by nothing"),
    "lr_scale": Ignored("it is read by nothing"),
    "iedit": Ignored("language models are edited, and no images"),
}
_RELEASED = Ignored("it chose among released checkpoints")
_ROME_BASELINE: Table = {
    "n_toks": Ignored("it is read by nothing"), "counterfact": _RELEASED, "zsre": _RELEASED, "mini": _RELEASED,
}  # fmt: skip
"""Keys of the files that came with ROME's code."""
_TWO_LOSSES: Table = {"cedit": Mapped("method.c_edit", number), "cloc": Mapped("method.c_loc", number)}


def _blocks(hidden: Any) -> int:
    # The network of MEND's code has a block more than hidden layers.
    return count(hidden) + 1


def _mode(supervised: Any, soft: Any) -> str:
    return "soft" if flag(soft or False) or not flag(supervised) else "hard"


ALGORITHMS = (
    Algorithm(
        "MEND",
        "mend",
        {
            **_TRAINED,
            **_TWO_LOSSES,
            **_ROME_BASELINE,
            "edit_lr": Mapped("method.step", number),
            "lr_lr": Mapped("method.step_lr", number),
            "rank": Mapped("method.rank", count),
            "n_hidden": Mapped("method.blocks", _blocks),
            "shared": Mapped("method.shared", flag),
            "norm": Mapped("method.normalise", flag),
            "hidden_dim": Ignored("the networks are as wide as inputs and gradients together", only=(None,)),
            "init": Ignored("the networks begin as the identity", only=("id",)),
            "mlp_class": Ignored("the networks are low-rank residual blocks", only=("IDMLP",)),
            "act": Ignored("the networks' activation is ReLU", only=("relu",)),
            "one_sided": Ignored("inputs and gradients are transformed together", only=(False,)),
            "x_only": Ignored("inputs and gradients are transformed together", only=(False,)),
            "delta_only": Ignored("inputs and gradients are transformed together", only=(False,)),
            "combine": Ignored("inputs and gradients are transformed together", only=(True,)),
        },
    ),
    Algorithm(
        "MALMEN",
        "malmen",
        {
            **_TRAINED,
            "batch_size": Mapped("method.rows_a_pass", count),
            "n_edits": Mapped(("batch", "train.batch"), count),
            "rank": Mapped("method.rank", count),
            "n_blocks": Mapped("method.blocks", count),
            "meta_lr": Mapped("method.step_lr", number),
            "loc_coef": Mapped("method.c_loc", number),
            "max_grad_norm": Mapped("train.clip", number),
            "editor_batch_size": Ignored("how many rows go through the networks at once changes no number"),
            "token": Ignored("every token with an input and a gradient counts", only=("mask",)),
        },
    ),
    Algorithm(
        "KE",
        "ke",
        {
            **_TRAINED,
            **_TWO_LOSSES,
            **_ROME_BASELINE,
        },
        # The port to GPT and T5 is trained on the weighted sum of the two losses.
        always={"method.objective": "weighted"},
    ),
    Algorithm(
        "SERAC",
        "serac",
        {
            **_TRAINED,
            "inner_params": Ignored("no weight of the model changes"),
            "small_name": Mapped("method.counterfactual", text),
            "cls_name": Mapped("method.encoder", text),
            "cls_class": Ignored("the encoder's own config says what it is"),
            "cedit": Mapped("method.c_edit", number),
            "cloc": Mapped("method.c_scope", number),
            "supervised": Mapped("method.mode", _mode, beside="soft_weighting"),
            "use_all_negatives": Mapped("method.all_negatives", flag),
            "freeze": Mapped("method.train_encoder", lambda value: None if value is None else False),
            "freeze_cntr": Ignored("the counterfactual model is trained", only=(False,)),
            "soft_weighting": Ignored("it is read beside supervised"),
            "checkpoint_grad": Ignored("it saves memory and changes no number"),
            "cross_attend": Ignored("the classifier compares embeddings", only=(False,)),
            "cos": Ignored("the classifier compares squared distances", only=(False,)),
            "square": Ignored("the classifier compares squared distances", only=(True,)),
            "bound_embeds": Ignored("embeddings are not bounded", only=(False,)),
            "dist_heads": Ignored("an embedding is one vector", only=(1,)),
            "lora": Ignored("whole blocks of the counterfactual model are trained", only=(None,)),
            "unlikelihood": Ignored("it is read by nothing"),
            "edit_bs": Ignored("it is read by nothing"),
        },
        # The encoder is a BERT, read at its first token as it is.
        always={"method.pooling": "first", "method.unit": False},
        spellings=("SERAC_MULTI",),
    ),
)
