"""Algorithms that follow the gradient of an edit: fine-tuning, LoRA and UltraEdit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everedit.compat.readers import choice, count, layers, modules, names_at_the_end, number, positive
from everedit.compat.rules import Algorithm, Ignored, Mapped
from everedit.compat.tables.common import COMMON, MODULES

__all__ = ["ALGORITHMS"]

_NO_KL = Ignored("there is no divergence in the loss", only=(0,))


def _finetuning(values: Mapping[str, Any]) -> str:
    """Return FT, FT-L or FT-M: EasyEdit calls them all FT, and the constraint and the objective tell them apart."""
    if values.get("objective_optimization") == "target_new":
        return "ft-m"
    return "ft-l" if positive(values.get("norm_constraint")) else "ft"


ALGORITHMS = (
    Algorithm(
        "FT",
        _finetuning,
        {
            **COMMON,
            **MODULES,
            "layers": Mapped("method.layers", layers),
            "num_steps": Mapped("method.steps", count),
            "batch_size": Mapped(("batch", "method.rows_a_step"), count),
            "lr": Mapped("method.lr", number),
            "weight_decay": Mapped("method.weight_decay", number),
            "kl_factor": _NO_KL,
            "norm_constraint": Mapped("method.box", positive),
            "objective_optimization": Mapped(
                "method.objective",
                # The second is misspelt in a published file.
                choice({"prompt_last": "prompt_last", "promptz_last": "prompt_last", "target_new": "target_new"}),
            ),
            "wd_power_law": Ignored("as a list, which files give, it is read by nothing"),
        },
        spellings=("FT-L", "FT-M"),
    ),
    Algorithm(
        "LoRA",
        "lora",
        {
            **COMMON,
            "lora_type": Ignored(
                "plain LoRA is trained: AdaLoRA as run there never re-allocates its ranks", only=("lora", "adalora")
            ),
            "layers": Ignored("every layer gets factors", only=([], None)),
            "num_steps": Mapped("method.steps", count),
            "lr": Mapped("method.lr", number),
            "weight_decay": Ignored("factors are not decayed", only=(0,)),
            "kl_factor": _NO_KL,
            "norm_constraint": Ignored("factors are not constrained", only=(False, None)),
            "rank": Mapped("method.rank", count),
            "lora_alpha": Mapped("method.alpha", number),
            "lora_dropout": Mapped("method.dropout", number),
            "target_modules": Mapped("method.modules", names_at_the_end),
            "sh_lr": Ignored("it is read by nothing"),
        },
    ),
    Algorithm(
        "UltraEdit",
        "ultraedit",
        {
            **COMMON,
            "inner_params": Mapped("method.modules", modules),
            "lr": Mapped("method.eta", number),
            "batch_size_once": Mapped("method.chunk", count),
            "token": Mapped("method.positions", choice({"ans": "answers", "mask": "all"})),
            "editor_batch_size": Ignored("rows are solved for together"),
        },
    ),
)
