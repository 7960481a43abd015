"""Algorithms that locate a fact in the weights: ROME, MEMIT and their relatives, KN, and SimIE around any of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from everedit.compat.readers import choice, count, flag, layer, layers, number, text
from everedit.compat.rules import Algorithm, Ignored, Mapped, Table
from everedit.compat.tables.common import COMMON, CONTEXTS, MODULES, MOMENTS, VALUES

__all__ = ["ALGORITHMS"]

_LOCATING: Table = {**COMMON, **MODULES, **MOMENTS, **VALUES}
_RANK_ONE: Table = {
    **_LOCATING,
    **CONTEXTS,
    "layers": Mapped("method.layer", layer),
    # False is what EasyEdit's files for ROME and R-ROME say.
    "mom2_adjustment": Mapped("method.second_moments", flag),
}
_SPREAD: Table = {
    **_LOCATING,
    "layers": Mapped("method.layers", layers),
    "layer_selection": Ignored("every layer of the list is edited", only=("all",)),
    "mom2_adjustment": Ignored("the second moments are part of the method", only=(True,)),
    "mom2_update_weight": Mapped("method.moment_weight", number),
}
_ALPHA: Table = {
    **_SPREAD,
    "mom2_update_weight": Ignored("it is read by nothing: the ridge is L2"),
    "P_loc": Ignored("the projector is computed from the second moments, which are kept"),
    "nullspace_threshold": Mapped("method.threshold", number),
    "L2": Mapped("method.ridge", number),
    # SimIE's code, whose AlphaEdit- sets it to 0.
    "Pre": Mapped("method.keep_previous", choice({0: False, 1: True})),
}


def _original(values: Mapping[str, Any]) -> str:
    return "rome" if flag(values.get("original_implementation", False)) else "r-rome"


def _key(prompt: Any, random: Any) -> str | None:
    if flag(prompt) and flag(True if random is None else random):
        raise ValueError("true to enable_prompt_keys or to enable_random_prefix_keys, not to both")
    return "bare" if flag(prompt) else None


def _steps(value: Any) -> int | None:
    # A single step takes all gradients at zero activation, where they say nothing of the fact.
    return None if count(value) == 1 else count(value)


def _solver(value: Any) -> str:
    """Return our solver for SimIE's: its three solve one and the same positive definite system, as Cholesky's does."""
    if text(value).casefold() not in ("lu", "cholesky", "svd", "woodbury"):
        raise ValueError("LU, Cholesky, SVD or woodbury")
    return "woodbury" if text(value).casefold() == "woodbury" else "cholesky"


ALGORITHMS = (
    Algorithm("ROME", "rome", _RANK_ONE),
    Algorithm(
        "R-ROME",
        _original,
        {
            **_RANK_ONE,
            "enable_prompt_keys": Mapped("method.key", _key, beside="enable_random_prefix_keys"),
            "enable_random_prefix_keys": Ignored(
                "keys are averaged over the contexts unless enable_prompt_keys is set"
            ),
            "original_implementation": Ignored("true asks for rome, false for r-rome"),
        },
        spellings=("R_ROME",),
    ),
    Algorithm(
        "WilKE",
        "wilke",
        {
            **_RANK_ONE,
            "layers": Ignored("the layer is chosen among those below scanning_ceiling"),
            "scanning_ceiling": Mapped("method.layers", lambda value: list(range(count(value)))),
        },
    ),
    Algorithm("MEMIT", "memit", _SPREAD),
    Algorithm(
        "PMET",
        "pmet",
        {**_SPREAD, "nll_loss_factor": Ignored("the target's loss counts once", only=(1,))},
    ),
    Algorithm(
        "EMMET",
        "emmet",
        {
            **_SPREAD,
            "mom2_update_weight": Mapped("method.moment_scale", number),
            "emmet_lambda": Mapped("method.ridge", number),
            "update_norm_lambda": Ignored("the change's norm has no weight of its own", only=(0,)),
        },
        # EasyEdit adds the ridge to a single edit as well.
        always={"method.ridge_for_one": True},
    ),
    Algorithm("AlphaEdit", "alphaedit", _ALPHA),
    Algorithm(
        "RLSEdit",
        "rlsedit",
        {**_SPREAD, "lam": Mapped("method.lam", number), "mu": Mapped("method.mu", number)},
    ),
    Algorithm(
        "KN",
        "kn",
        {
            **COMMON,
            "batch_size": Ignored("how many steps run at once changes no number"),
            "steps": Mapped("method.steps", _steps),
            "adaptive_threshold": Mapped("method.threshold", number),
            "p": Mapped("method.share", number),
            "refine": Ignored("neurons are shared by the wordings that an edit has", only=(False,)),
            "lr_scale": Ignored("it is read by nothing"),
            "n_toks": Ignored("it is read by nothing"),
        },
    ),
    Algorithm(
        "SimIE",
        # A policy: its base method has hyper-parameters of its own.
        "",
        {
            **COMMON,
            "base_method": Ignored("its own file says what it is"),
            "base_hparams": Ignored("the hyper-parameters of base_method"),
            "lamHyper": Mapped("policy.lam", number),
            "init_model": Mapped("policy.start", lambda value: "base" if flag(value) else "current"),
            "solver": Mapped("policy.solver", _solver),
            "fast": Ignored("keys are taken where the changed weights are, at once"),
        },
    ),
)
