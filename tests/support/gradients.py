"""Gradients of whole weights by whole forwards of whole texts: what factors taken from hooks are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from everedit.edit import Edit
from everedit.models import LanguageModel

__all__ = ["Pairs", "as_stored", "pairs_by_hand", "target_losses", "weight_gradients", "whole_logits"]

Pairs = dict[str, tuple[Tensor, Tensor]]


def whole_logits(
    lm: LanguageModel,
    prompt: str,
    target: str,
    weights: Mapping[str, Tensor] | None = None,
    *,
    everywhere: bool = False,
) -> Tensor:
    """The logits of a target's tokens, or at every token that is read, with some weights in place of the model's."""
    text = lm.encode(prompt, target)
    if lm.layout.is_decoder_only:
        inputs = {"input_ids": torch.tensor([text.ids[:-1]]), "use_cache": False}
        start = 0 if everywhere else text.prompt_end - 1
    else:
        ids = [lm.model.config.decoder_start_token_id, *text.target_ids[:-1]]
        source = torch.tensor([lm.tokenizer(prompt).input_ids])
        inputs, start = {"input_ids": source, "decoder_input_ids": torch.tensor([ids])}, 0
    found = functional_call(lm.model, dict(weights or {}), args=(), kwargs=inputs, tie_weights=False)
    return found.logits[0, start:]


def target_losses(lm: LanguageModel, edit: Edit, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """The loss of each token of an edit's target."""
    wanted = torch.tensor(lm.encode(edit.prompt, edit.target_new).target_ids)
    return F.cross_entropy(whole_logits(lm, edit.prompt, edit.target_new, weights), wanted, reduction="none")


@contextmanager
def _wanting_gradients(lm: LanguageModel, names: Sequence[str]) -> Iterator[list[Tensor]]:
    weights = [lm.model.get_parameter(name).requires_grad_() for name in names]
    try:
        with torch.enable_grad():
            yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def as_stored(lm: LanguageModel, name: str, matrix: Tensor) -> Tensor:
    """A matrix (d_out, d_in) the way round in which the model stores this weight, or back."""
    return matrix.T if isinstance(lm.layout.module_of(name), Conv1D) else matrix


def weight_gradients(lm: LanguageModel, edits: Sequence[Edit], names: Sequence[str]) -> dict[str, Tensor]:
    """The gradients (d_out, d_in) of the mean loss over all target tokens of some edits."""
    with _wanting_gradients(lm, names) as weights:
        loss = torch.cat([target_losses(lm, edit) for edit in edits]).mean()
        found = torch.autograd.grad(loss, weights)
    return {name: as_stored(lm, name, gradient) for name, gradient in zip(names, found, strict=True)}


def pairs_by_hand(lm: LanguageModel, edits: Sequence[Edit], names: Sequence[str]) -> Pairs:
    """Inputs and output gradients of the same loss at all tokens at which it moves, one text after another."""
    total = sum(len(lm.encode(edit.prompt, edit.target_new).target_ids) for edit in edits)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for edit in edits:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            lm.layout.module_of(name).register_forward_hook(
                lambda _, args, out, name=name, seen=seen: seen.__setitem__(name, (args[0], out))
            )
            for name in names
        ]
        try:
            with _wanting_gradients(lm, names):
                loss = target_losses(lm, edit).sum() / total
                slopes = torch.autograd.grad(loss, [out for _, out in seen.values()])
        finally:
            for handle in handles:
                handle.remove()
        for (name, (inputs, _)), slope in zip(seen.items(), slopes, strict=True):
            u, delta = inputs.detach().flatten(0, -2), slope.flatten(0, -2)
            moves = (delta != 0).any(1) & (u != 0).any(1)
            found[name].append((u[moves], delta[moves]))
    return {name: (torch.cat([u for u, _ in rows]), torch.cat([d for _, d in rows])) for name, rows in found.items()}
