"""The net change of the weights as a LoRA adapter: W + (alpha / r) B A with alpha = r, for peft, vLLM and others.

Every module gets factors of one rank, narrower ones padded with zeros. peft would allow a rank for each module
(``rank_pattern``), but vLLM reads ``r`` and ``lora_alpha`` alone.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from everedit.errors import EvereditError, NotApplicable
from everedit.export.factors import Factors, factorised, rounding
from everedit.export.source import Source, owner
from everedit.models import LanguageModel
from everedit.models.layout import oriented

__all__ = ["VLLM_RANKS", "Options", "write"]

WHAT = "a LoRA adapter"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for --max-lora-rank (``MaxLoRARanks`` in vllm/config/lora.py; 1 was added later)."""


class Options(BaseModel):
    """Settings of this export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(VLLM_RANKS[-1], ge=1, description="the largest rank; a change of a higher one is truncated")


def write(source: Source, lm: LanguageModel, folder: Path, options: Options) -> dict[str, Any]:
    """Fill ``folder``; plain peft loads it on the unedited model and gives the edited model's logits.

    That holds up to rounding, unless the change has a higher rank than ``options.rank``: the figures say what was
    left out. Raises :class:`NotApplicable` for a weight outside of the blocks.
    """
    peft = _peft()
    _require_modules_of_blocks(source, lm)
    found: dict[str, Factors] = {}
    for name, delta in source.change.deltas.items():
        weight = source.edited(lm, name, delta)
        found[name] = factorised(delta, rounding(weight, torch.float32, source.roundings), options.rank)
    width = max(1, *(factors.width for factors in found.values()))
    config = _config(peft, lm, list(found), width)
    tensors: dict[str, Tensor] = {}
    for module in _wrapped(peft, lm, config):
        a, b = _padded(found.get(f"{module}.weight"), lm.model.get_submodule(module), width)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    config.save_pretrained(folder)
    # Read back by peft itself: what it does not understand is found here and not by whoever loads the adapter.
    peft.PeftConfig.from_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return _figures(found, width)


def _figures(found: dict[str, Factors], width: int) -> dict[str, Any]:
    return {
        "rank": width,
        "rank_of_change": max(factors.rank for factors in found.values()),
        "relative_error": max(factors.relative_error for factors in found.values()),
        "vllm_max_lora_rank": next((rank for rank in VLLM_RANKS if rank >= width), None),
        "modules": {
            name.removesuffix(".weight"): {"rank": factors.rank, "relative_error": factors.relative_error}
            for name, factors in found.items()
        },
    }


def _require_modules_of_blocks(source: Source, lm: LanguageModel) -> None:
    names = dict(lm.model.named_modules(remove_duplicate=False))
    for name in source.change.deltas:
        module = owner(lm, name)
        # One weight under two names: an adapter on one module would leave the other as it was.
        others = [other for other, part in names.items() if getattr(part, "weight", None) is module.weight]
        if len(others) > 1:
            raise NotApplicable(
                what=f"the weight is shared by {' and '.join(sorted(others))}, and an adapter changes one module",
                where=name,
                fix="export as merged",
            )
        if not isinstance(module, (nn.Linear, Conv1D)) or _block_path(lm, name) is None:
            raise NotApplicable(
                what="the adapter is for linear layers inside the model's blocks, and this weight is none",
                where=name,
                fix="export as merged",
            )


def _block_path(lm: LanguageModel, name: str) -> tuple[str, int, str] | None:
    """Return a module's list of blocks, its layer, and its path inside of the block; None outside of the blocks."""
    for blocks in (lm.layout.family.blocks, lm.layout.family.encoder_blocks):
        if blocks and name.startswith(f"{blocks}."):
            layer, _, path = name.removeprefix(f"{blocks}.").removesuffix(".weight").partition(".")
            return blocks, int(layer), path
    return None


def _config(peft: Any, lm: LanguageModel, names: list[str], width: int) -> Any:
    places = [place for name in names if (place := _block_path(lm, name)) is not None]
    layers = sorted({layer for _, layer, _ in places})
    conv1d = [isinstance(owner(lm, name), Conv1D) for name in names]
    every = max(lm.layout.n_layers, 1 + max(layers))
    # Where peft looks for the base model if it is given none.
    source = lm.model.name_or_path or lm.name
    return peft.LoraConfig(
        r=width,
        lora_alpha=width,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM" if lm.layout.is_decoder_only else "SEQ_2_SEQ_LM",
        target_modules=sorted(_short_names(lm, {path for _, _, path in places})),
        layers_to_transform=None if len(layers) == every else layers,
        layers_pattern=None if len(layers) == every else lm.layout.family.blocks.rpartition(".")[2],
        fan_in_fan_out=all(conv1d),
        base_model_name_or_path=str(Path(source).resolve()) if Path(source).is_dir() else source,
        inference_mode=True,
    )


def _short_names(lm: LanguageModel, paths: set[str]) -> set[str]:
    """Return the usual short names (``down_proj``), and longer ones where another module is called the same."""
    found = set()
    for path in paths:
        short = path.rpartition(".")[2]
        same = {
            place[2]
            for name, module in lm.model.named_modules()
            if name.rpartition(".")[2] == short
            and isinstance(module, (nn.Linear, Conv1D))
            and (place := _block_path(lm, name)) is not None
        }
        found.add(short if same <= paths else path)
    return found


def _wrapped(peft: Any, lm: LanguageModel, config: Any) -> list[str]:
    """Return the modules that peft will put factors on, by its own rule; where nothing was edited they are zero."""
    exists = peft.tuners.tuners_utils.check_target_module_exists
    return [name for name, _ in lm.model.named_modules() if exists(config, name)]


def _padded(factors: Factors | None, module: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Return A (width, d_in) and B (d_out, width) in float32."""
    d_out, d_in = oriented(module).shape
    a, b = torch.zeros(width, d_in), torch.zeros(d_out, width)
    if factors is not None:
        a[: factors.width], b[:, : factors.width] = factors.right.T, factors.left
    return a, b


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError as error:
        raise EvereditError(
            what="an adapter is written with the library peft", fix="pip install 'everedit[export]'"
        ) from error
    return peft
