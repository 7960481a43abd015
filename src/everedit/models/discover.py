"""Structural discovery: find the parts of a decoder-only model that no family file describes."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from everedit.errors import ModelError
from everedit.models.families import Family

__all__ = ["discover"]

_LINEAR = (nn.Linear, Conv1D)


def discover(model: PreTrainedModel) -> Family:
    """Return a description of ``model`` found by its structure.

    The blocks are the longest list of equal modules. Inside a block, the MLP's output projection is the
    linear map to the hidden size whose input is the widest of those outside the attention; its input
    projections are the maps from the hidden size under the same parent; the attention's output projection
    is the map to the hidden size under a module whose name or class says attention.

    Raises :class:`ModelError` that lists exactly which parts could not be found.
    """
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise ModelError(
            what=f"the encoder-decoder model_type '{kind}' has no family file, and only decoders are discovered",
            fix="add a file for it to everedit/models/families",
        )
    missing: list[str] = []
    blocks_path, block = _blocks(model)
    if block is None:
        raise _not_found(kind, ["a list of at least two equal transformer blocks"])
    hidden = int(model.config.hidden_size)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, _LINEAR)}
    attention = {name for name in linears if _is_attention(block, name)}
    outs = {name: _shape(module)[1] for name, module in linears.items() if _shape(module)[0] == hidden}
    mlp_outs = sorted((width, name) for name, width in outs.items() if name not in attention and width != hidden)
    attention_outs = [name for name in outs if name in attention]
    mlp_out = mlp_outs[-1][1] if mlp_outs else ""
    if not mlp_out:
        missing.append(f"an MLP output projection (a linear map to the hidden size {hidden} outside the attention)")
    parent = mlp_out.rpartition(".")[0]
    mlp_in = tuple(
        name
        for name, module in linears.items()
        if name not in attention and name.rpartition(".")[0] == parent and _shape(module)[1] == hidden
    )
    if mlp_out and not mlp_in:
        missing.append(f"an MLP input projection beside '{mlp_out}'")
    if not attention_outs:
        missing.append("an attention output projection")
    norm = _final_norm(model, blocks_path)
    if norm is None:
        missing.append("a final norm beside the blocks")
    if model.get_output_embeddings() is None:
        missing.append("a language-model head")
    if missing or norm is None:
        raise _not_found(kind, missing)
    return Family(
        name=f"{kind} (discovered)",
        model_types=(kind,),
        blocks=blocks_path,
        mlp_in=(mlp_in,),
        mlp_out=mlp_out,
        attention_out=attention_outs[-1],
        final_norm=norm,
    )


def _blocks(model: PreTrainedModel) -> tuple[str, nn.Module | None]:
    best: tuple[int, str, nn.Module | None] = (1, "", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            weighty = any(isinstance(part, _LINEAR) for part in module[0].modules())
            if weighty and len(module) > best[0]:
                best = (len(module), name, module[0])
    return best[1], best[2]


def _is_attention(block: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        module = block.get_submodule(".".join(parents[:depth]))
        if "attn" in parents[depth - 1].lower() or "attention" in type(module).__name__.lower():
            return True
    return False


def _shape(module: nn.Module) -> tuple[int, int]:
    rows, columns = cast(torch.Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _final_norm(model: PreTrainedModel, blocks_path: str) -> str | None:
    parent_path = blocks_path.rpartition(".")[0]
    parent = model.get_submodule(parent_path) if parent_path else model
    norms = [name for name, module in parent.named_children() if "norm" in type(module).__name__.lower()]
    return ".".join(filter(None, (parent_path, norms[-1]))) if norms else None


def _not_found(kind: str, missing: list[str]) -> ModelError:
    return ModelError(
        what=f"the model_type '{kind}' is not known and its structure does not show: {'; '.join(missing)}",
        fix="add a file for it to everedit/models/families (ten lines; see CONTRIBUTING)",
    )
