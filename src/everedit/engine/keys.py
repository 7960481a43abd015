"""Keys: what goes into a layer's down projection, at the subject's last token or at every token of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.rows import chunks, prompt_rows
from everedit.models import LanguageModel
from everedit.models.forced import Forced
from everedit.models.hooks import capture, changed_output, resumed_after, stopping_at
from everedit.models.tokens import Batch
from everedit.patch import LowRank

__all__ = ["LayerWalk", "Reading", "prompt_keys", "subject_keys", "token_keys"]

_TOKENS_A_BATCH = 4096


def subject_keys(lm: LanguageModel, edits: Sequence[Edit], prefixes: Sequence[str], layer: int) -> Tensor:
    """Return the keys at the subject's last token, (edits, prefixes, D): the text behind it plays no part."""
    rows = [row.ids[: row.subject_last + 1] for edit in edits for row in prompt_rows(lm, edit, prefixes)]
    module, found = lm.layout.mlp_out(layer), []
    for part in chunks([len(row) for row in rows], _TOKENS_A_BATCH):
        chunk = rows[part]
        keys = lm.inputs_of({layer: module}, lm.pad(chunk))[layer]
        found.append(keys[torch.arange(len(chunk)), [len(row) - 1 for row in chunk]].float())
    return torch.cat(found).view(len(edits), len(prefixes), -1)


def prompt_keys(lm: LanguageModel, prompts: Sequence[str], layer: int) -> Tensor:
    """Return the keys at the prompts' last tokens, (prompts, D); of an encoder-decoder at the first decoded place."""
    name = lm.layout.mlp_out_weight(layer)
    if not lm.layout.is_decoder_only:
        place = 0 if name.startswith("decoder") else -1
        texts = [Edit(prompt=prompt, target_new=".") for prompt in prompts]
        return torch.stack([token_keys(lm, [text], [name])[name][:, place] for text in texts])
    rows = [lm.encode(prompt).ids for prompt in prompts]
    module, found = lm.layout.mlp_out(layer), []
    for part in chunks([len(row) for row in rows], _TOKENS_A_BATCH):
        chunk = rows[part]
        keys = lm.inputs_of({layer: module}, lm.pad(chunk))[layer].view(len(chunk), max(map(len, chunk)), -1)
        found.append(keys[torch.arange(len(chunk)), [len(row) - 1 for row in chunk]].float())
    return torch.cat(found)


def token_keys(lm: LanguageModel, edits: Sequence[Edit], weights: Sequence[str]) -> dict[str, Tensor]:
    """Return, by the name of a weight, the inputs of its module at every token of prompt and target, (D, tokens).

    In an encoder-decoder they are those of the part that the module belongs to.
    """
    texts = [lm.encode(edit.prompt, edit.target_new) for edit in edits]
    inputs, real = lm.pad([text.ids for text in texts]).inputs(), {}
    if not lm.layout.is_decoder_only:
        inputs = Forced.of(lm, texts).inputs
        real["decoder"] = inputs["decoder_attention_mask"].bool()
    real["encoder"] = inputs["attention_mask"].bool()
    modules = {name: lm.layout.module_of(name) for name in weights}
    with torch.no_grad(), capture(inputs=modules, rows=len(texts)) as seen:
        lm.states(**inputs)
    return {name: seen[name][real.get(name.partition(".")[0], real["encoder"])].float().T for name in weights}


@dataclass(frozen=True)
class Reading:
    """What :class:`LayerWalk` reads at one layer for n edits: ``keys`` (n, prefixes, D), and for the bare prompt
    the MLP's output there, ``mlp`` (n, H), and the last layer's MLP and block outputs, ``output`` and ``state`` (n, H).
    """

    keys: Tensor
    mlp: Tensor
    output: Tensor
    state: Tensor


@dataclass
class _Part:
    """Some rows of the walk, and the hidden states that enter the block to resume at."""

    batch: Batch
    last: Tensor
    entering: Tensor | None = None


class LayerWalk:
    """Re-reads keys and states layer by layer while updates are added, each time from the last changed block on.

    Updates are added to the modules' outputs by hooks; the weights are not touched. Rows end at the subject's
    last token, since a causal model does not look further.
    """

    def __init__(self, lm: LanguageModel, edits: Sequence[Edit], prefixes: Sequence[str], last_layer: int) -> None:
        self.lm, self.last_layer, self.n_prefixes = lm, last_layer, len(prefixes)
        rows = [row.ids[: row.subject_last + 1] for edit in edits for row in prompt_rows(lm, edit, prefixes)]
        self._parts = []
        for part in chunks([len(row) for row in rows], _TOKENS_A_BATCH):
            last = torch.tensor([len(row) - 1 for row in rows[part]], device=lm.device)
            self._parts.append(_Part(lm.pad(rows[part]), last))
        self._resume_at = 0

    def read(self, layer: int, updates: Mapping[int, LowRank]) -> Reading:
        """Return what ``layer`` and the last layer show with ``updates`` (by layer) in place.

        Layers must be asked for in ascending order, and an update, once given, must stay.
        """
        found = [self._read(part, layer, updates) for part in self._parts]
        self._resume_at = layer
        keys, *outputs = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        grouped = keys.view(-1, self.n_prefixes, keys.shape[-1])
        return Reading(grouped, *(output[:: self.n_prefixes] for output in outputs))

    def _read(self, part: _Part, layer: int, updates: Mapping[int, LowRank]) -> tuple[Tensor, ...]:
        layout = self.lm.layout
        blocks = [layout.block(index) for index in range(self._resume_at)]
        last_block, out = layout.block(self.last_layer), layout.mlp_out(layer)
        with torch.no_grad(), ExitStack() as stack:
            if part.entering is not None and blocks:
                as_tuple = self.lm.blocks_return_tuples
                stack.enter_context(resumed_after(blocks, part.entering, as_tuple=as_tuple))
            for index, update in updates.items():
                if index >= self._resume_at:
                    stack.enter_context(_added(layout.mlp_out(index), update))
            seen = stack.enter_context(
                capture(
                    {"key": out, "entering": layout.block(layer)},
                    {"mlp": out, "output": layout.mlp_out(self.last_layer), "state": last_block},
                    rows=len(part.batch),
                )
            )
            stack.enter_context(stopping_at(last_block))
            self.lm.states(**part.batch.inputs())
        part.entering = seen["entering"]
        at = (torch.arange(len(part.batch), device=self.lm.device), part.last)
        return tuple(seen[name][at].float() for name in ("key", "mlp", "output", "state"))


def _added(module: torch.nn.Module, update: LowRank) -> AbstractContextManager[None]:
    def change(inputs: Tensor, output: Tensor) -> Tensor:
        factors = update.to(output.device)
        extra = (inputs.to(factors.right.dtype) @ factors.right) @ factors.left.T
        return output + extra.to(output.dtype)

    return changed_output(module, change)
