"""The way back: the difference between a model that somebody else edited and its base, as one patch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everedit.errors import ModelError, NotApplicable
from everedit.export.factors import factorised, rounding
from everedit.models import LanguageModel, load_model
from everedit.models.layout import oriented
from everedit.patch import Delta, Dense, LowRank, Patch

__all__ = ["difference"]

_NO_PART_OF_THE_FUNCTION = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "pad_token_id",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip


def difference(base: LanguageModel, folder: str | Path) -> Patch:
    """Return the patch that makes ``base``, unedited, the model in ``folder``.

    A change comes as low-rank factors where these give the folder's weight up to the rounding of its dtype, and as a
    whole matrix elsewhere. The patch's ``info`` holds for each weight its ``rank`` (of a whole matrix None) and the
    ``relative_error`` of the factors.

    Raises :class:`ModelError` if the folder is no model with safetensors, is of another architecture, shape or
    vocabulary, or does not differ; :class:`NotApplicable` if it differs in something that a patch cannot hold.
    """
    path = Path(folder).expanduser()
    if not any((path / f"model.safetensors{ending}").is_file() for ending in ("", ".index.json")):
        raise ModelError(
            what="this is no folder with a model's safetensors, and weights in other files may hold code",
            where=str(path),
            fix="give a folder that save_pretrained wrote",
        )
    peer = load_model(path, device=base.device, dtype="auto")
    _require_same_kind(base, peer)
    deltas: dict[str, Delta] = {}
    found: dict[str, Any] = {}
    for name, theirs, ours in _differing(base, peer):
        deltas[name], found[name] = _delta(theirs, ours, peer.dtype)
    if not deltas:
        raise ModelError(what="the model does not differ from its base", where=str(path), fix="there is nothing to do")
    info = {"difference_of": peer.fingerprint, "base": base.fingerprint, "weights": found}
    return Patch(deltas, info)


def _require_same_kind(base: LanguageModel, peer: LanguageModel) -> None:
    fix = "give the base model that it was edited from"
    kinds = [lm.model.config.model_type for lm in (peer, base)]
    if kinds[0] != kinds[1]:
        raise ModelError(what=f"it is a {kinds[0]} model, and the base is a {kinds[1]}", where=peer.name, fix=fix)
    configs = [lm.model.config.to_dict() for lm in (peer, base)]
    for key in sorted((configs[0].keys() | configs[1].keys()) - _NO_PART_OF_THE_FUNCTION):
        theirs, ours = (config.get(key) for config in configs)
        if theirs != ours:
            raise ModelError(what=f"its config says {key}: {theirs}, the base's {ours}", where=peer.name, fix=fix)
    shapes = [{name: tuple(weight.shape) for name, weight in lm.model.named_parameters()} for lm in (peer, base)]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        theirs, ours = (shape.get(name) for shape in shapes)
        if theirs != ours:
            what = f"the weight '{name}' has shape {theirs or 'none'}, and {ours or 'none'} in the base"
            raise ModelError(what=what, where=peer.name, fix=fix)
    if peer.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise ModelError(what="its tokenizer has another vocabulary than the base's", where=peer.name, fix=fix)


def _differing(base: LanguageModel, peer: LanguageModel) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, weight and base weight, both (d_out, d_in), of all that differ by more than the dtype's rounding."""
    ours = dict(base.model.named_parameters())
    for name, theirs in peer.model.named_parameters():
        # A peer that was saved in a narrower dtype has all of its weights rounded: that is no edit.
        if torch.equal(theirs, ours[name].to(theirs.dtype)):
            continue
        modules = [lm.model.get_submodule(name.rpartition(".")[0]) for lm in (peer, base)]
        if not name.endswith(".weight") or theirs.dim() != 2 or not all(map(_is_matrix, modules)):
            raise NotApplicable(
                what=f"it differs in '{name}' too, and a patch holds changes of weight matrices alone",
                where=peer.name,
                fix="use the folder as a base model of its own",
            )
        yield name, oriented(modules[0]), oriented(modules[1]).to(theirs.dtype)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), Tensor)


def _delta(theirs: Tensor, ours: Tensor, dtype: torch.dtype) -> tuple[Delta, dict[str, Any]]:
    change = theirs.double() - ours.double()
    factors = factorised(Dense(change), rounding(theirs, dtype))
    # Factors that take as much room as the matrix itself are no gain.
    if factors.width * sum(change.shape) < change.numel():
        low = LowRank(factors.left.float(), factors.right.float())
        return low, {"rank": factors.rank, "relative_error": factors.relative_error}
    short = change.float()
    exact = torch.equal((ours.double() + short.double()).to(dtype), theirs)
    return Dense(short if exact else change), {"rank": None, "relative_error": 0.0}
