"""The edited model as an ordinary transformers folder: weights, config, generation config, tokenizer, licence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from everedit.errors import ExportError, NumericalError
from everedit.export.source import Source, owner
from everedit.models import LanguageModel
from everedit.models.load import quiet

__all__ = ["Options", "write"]

WHAT = "a merged model"
_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy)", re.IGNORECASE)


class Options(BaseModel):
    """Settings of this export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="dtype of the weights; the one that the model was edited in"
    )
    shard: str = Field("5GB", description="the largest file")


def write(source: Source, lm: LanguageModel, folder: Path, options: Options) -> dict[str, Any]:
    """Fill ``folder``; plain ``from_pretrained`` loads it and gives the edited model's logits, bit for bit.

    With another ``dtype`` than the model's all weights are rounded to it, once.
    """
    dtype = lm.dtype if options.dtype is None else getattr(torch, options.dtype)
    weights = _in_dtype(_edited_weights(source, lm), dtype)
    try:
        with quiet():
            lm.model.save_pretrained(folder, state_dict=weights, max_shard_size=options.shard)
            lm.tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError) as error:
        # Such as a generation config that contradicts itself, or a size that is none.
        raise ExportError(
            what=f"transformers cannot save the model: {(str(error).splitlines() or ['no reason given'])[0]}",
            where=lm.name,
            fix="correct the base model's folder, or the option",
        ) from error
    file, name = folder / "config.json", str(dtype).removeprefix("torch.")
    config = json.loads(file.read_text(encoding="utf-8"))
    # save_pretrained writes the dtype of the model in memory.
    file.write_text(json.dumps({**config, "dtype": name}, indent=2) + "\n", encoding="utf-8")
    copy_licence(lm, folder)
    return {"dtype": name, "weights_changed": len(source.change.deltas)}


def _edited_weights(source: Source, lm: LanguageModel) -> dict[str, Tensor]:
    """Return the state dict with every changed weight replaced, also under the other names of a tied one."""
    weights: dict[str, Tensor] = dict(lm.model.state_dict())
    for name in source.change.deltas:
        module = owner(lm, name)
        old = module.weight
        assert isinstance(old, Tensor)
        new = source.edited(lm, name).to(old.dtype)
        new = (new.T if isinstance(module, Conv1D) else new).contiguous()
        for key, tensor in weights.items():
            if tensor.data_ptr() == old.data_ptr() and tensor.shape == old.shape:
                weights[key] = new
    return weights


def _in_dtype(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast: dict[int, Tensor] = {}
    for tensor in weights.values():
        # Tied weights stay one tensor.
        if tensor.is_floating_point() and tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.to(dtype)
    found = {name: cast.get(tensor.data_ptr(), tensor) for name, tensor in weights.items()}
    for name, tensor in found.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(what=f"a weight does not fit into {dtype}", where=name, fix="export in another dtype")
    return found


def copy_licence(lm: LanguageModel, folder: Path) -> None:
    """Copy the base model's licence files, which an edited copy must carry on."""
    base = Path(lm.model.name_or_path)
    if lm.model.name_or_path and base.is_dir():
        for file in base.iterdir():
            if file.is_file() and _LICENCE.match(file.name) and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
