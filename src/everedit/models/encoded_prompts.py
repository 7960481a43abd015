"""Prompts that an encoder has read once, and what its decoder says behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everedit.models.forced import decoder_rows, encoder_inputs
from everedit.models.model import LanguageModel

__all__ = ["EncodedPrompts"]


@dataclass
class EncodedPrompts:
    """What :class:`everedit.models.prefill.Prefill` is for a decoder: the encoder's states (n, P, H) and their mask,
    and the decoder's states (n, H) that predict the first token.
    """

    lm: LanguageModel
    states: Tensor
    mask: Tensor
    last: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> EncodedPrompts:
        """Run prompts, rows of at least one id, through the encoder."""
        inputs = encoder_inputs(lm, prompts)
        states = lm.model.get_encoder()(**inputs).last_hidden_state
        found = cls(lm, states, inputs["attention_mask"], states[:, 0])
        found.last = found.states_of(torch.arange(len(prompts), device=lm.device), [()] * len(prompts))[:, 0]
        return found

    def states_of(self, prompts: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the decoder's states (texts, 1 + S, H) at the start token and the tokens of ``texts``."""
        batch = self.lm.pad(decoder_rows(self.lm, texts))
        inputs: dict[str, Any] = {
            "encoder_states": self.states[prompts],
            "attention_mask": self.mask[prompts],
            "decoder_input_ids": batch.ids,
            "decoder_attention_mask": batch.mask,
        }
        return self.lm.states(**inputs)

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of some states."""
        return self.lm.logits(states)

    @torch.no_grad()
    def states_behind(self, prompts: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the decoder's states (texts, S, H) at the tokens of ``texts``, behind the prompts of these numbers."""
        return self.states_of(prompts, texts)[:, 1:]

    @torch.no_grad()
    def continuations(
        self, prompts: Tensor, room: Tensor, stops: Tensor, drafts: Sequence[Sequence[Sequence[int]]] = ()
    ) -> list[list[int]]:
        """Return the greedy continuation of each of ``prompts`` (numbers), up to a stop (included) or its ``room``.

        Without a cache, since answers are a few tokens long; guesses (``drafts``) are not made use of.
        """
        found: list[list[int]] = [[] for _ in range(len(prompts))]
        live = list(range(len(prompts)))
        while live:
            states = self.states_of(prompts[live], [found[row] for row in live])
            # Rows that are still running are equally long.
            for row, token in zip(live, self.lm.logits(states[:, -1]).argmax(-1).tolist(), strict=True):
                found[row].append(token)
            live = [row for row in live if len(found[row]) < int(room[row]) and not bool(stops[row, found[row][-1]])]
        return found
