"""Texts read with their targets given: what goes into the model, and where each target token is predicted.

A decoder reads prompt and target in one row; an encoder-decoder reads the prompt in its encoder and predicts the target
in its decoder, behind a start token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everedit.models.model import LanguageModel
from everedit.models.tokens import Encoded

__all__ = ["Forced", "decoder_rows", "encoder_inputs"]


@dataclass(frozen=True)
class Forced:
    """The keyword arguments of :meth:`LanguageModel.states`, and what is scored where.

    ``real`` (rows, length) is False on padding among the places whose states come back. ``labels`` (places,) are
    predicted from the states at ``rows`` and ``columns``; they weigh ``shares``, which sum to 1 so that each text
    counts the same.
    """

    inputs: dict[str, Any]
    real: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    shares: Tensor

    @classmethod
    def of(cls, lm: LanguageModel, texts: Sequence[Encoded], *, bag: bool = False) -> Forced:
        """Return texts with targets as a batch; with ``bag`` all of a target is scored where its first token is."""
        if lm.layout.is_decoder_only:
            batch = lm.pad(input_rows(texts, bag=bag))
            inputs, offset = batch.inputs(), [text.prompt_end - 1 for text in texts]
        else:
            batch = lm.pad(decoder_rows(lm, [() if bag else text.target_ids[:-1] for text in texts]))
            encoder = encoder_inputs(lm, [text.ids[: text.prompt_end] for text in texts])
            inputs = {**encoder, "decoder_input_ids": batch.ids, "decoder_attention_mask": batch.mask}
            offset = [0] * len(texts)
        places = [
            (row, offset[row] + (0 if bag else place), token, 1 / len(text.target_ids) / len(texts))
            for row, text in enumerate(texts)
            for place, token in enumerate(text.target_ids)
        ]
        columns = (torch.tensor(values, device=lm.device) for values in zip(*places, strict=True))
        return cls(inputs, batch.mask.bool(), *columns)

    def __len__(self) -> int:
        return len(self.real)


def input_rows(texts: Sequence[Encoded], *, bag: bool = False) -> list[tuple[int, ...]]:
    """Return what a decoder reads of each text: the last target token is never an input."""
    return [text.ids[: text.prompt_end] if bag else text.ids[:-1] for text in texts]


def encoder_inputs(lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return prompts as an encoder reads them, each with the end token that training put there."""
    end = lm.tokenizer.eos_token_id
    batch = lm.pad([[*prompt, end] if end is not None else list(prompt) for prompt in prompts])
    return {"input_ids": batch.ids, "attention_mask": batch.mask}


def decoder_rows(lm: LanguageModel, targets: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return what a decoder reads in front of each next token: the start token and the target so far."""
    return [[int(lm.model.config.decoder_start_token_id), *target] for target in targets]
