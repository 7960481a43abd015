"""ROME's and MEMIT's own interface: requests and JSON files in, the model changed in place and its old weights out."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from everedit.compat.classes import FTHyperParams, KNHyperParams, MEMITHyperParams, ROMEHyperParams, WilKEHyperParams
from everedit.compat.hparams import HyperParams
from everedit.compat.requests import edits_from_requests
from everedit.experiments.run import make_editor
from everedit.models import LanguageModel

__all__ = [
    "FTHyperParams", "KNHyperParams", "MEMITHyperParams", "ROMEHyperParams", "WilKEHyperParams", "apply_memit_to_model",
    "apply_rome_to_model", "apply_to_model",
]  # fmt: skip


def apply_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: HyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    cache_template: str | None = None,
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Make the edits of some requests in ``model``, or in a copy of it, and return it with the weights it had before.

    A method that solves batches makes them together, any other one after another. The weights are by parameter name,
    and there are none without ``return_orig_weights``. Values are solved for anew: no ``cache_template`` is read.

    Raises an :class:`everedit.errors.EvereditError` and changes nothing if one of the edits cannot be made.
    """
    edits = edits_from_requests(requests)
    edited = copying.deepcopy(model) if copy else model
    lm = LanguageModel(str(getattr(model, "name_or_path", "") or type(model).__name__), edited, tok)
    editor = make_editor(lm, hparams.run_config())
    for edit in edits:
        editor.check(edit)
    editor.edit(edits, score=False)
    changed = editor.state().weights.masters if return_orig_weights else {}
    with editor.unedited():
        originals = {name: edited.get_parameter(name).detach().clone() for name in changed}
    return edited, originals


apply_rome_to_model = apply_memit_to_model = apply_to_model
