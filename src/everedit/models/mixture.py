"""Two models that answer together: p = (1 - s) p_a + s p_b, each behind a prompt of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.models.encoded_prompts import EncodedPrompts
from everedit.models.model import LanguageModel
from everedit.models.prefill import Prefill

__all__ = ["MixedPrompts"]


@dataclass
class MixedPrompts:
    """n prompts as both models have run them, and the shares s (n,) of the second one.

    It is read as a :class:`Prefill` is; a state is both models' states in a line, with the share behind them.
    """

    first: Prefill | EncodedPrompts
    second: Prefill | EncodedPrompts
    shares: Tensor

    @property
    def lm(self) -> LanguageModel:
        """The first model."""
        return self.first.lm

    @property
    def last(self) -> Tensor:
        """The states that predict the first token behind each prompt."""
        return torch.cat([self.first.last, self.second.last, self.shares[:, None].to(self.first.last)], dim=-1)

    def states_behind(self, prompts: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the states at ``texts``, each read behind the prompt of that number."""
        first, second = (part.states_behind(prompts, texts) for part in (self.first, self.second))
        share = self.shares[prompts].to(first)[:, None, None].expand(*first.shape[:2], 1)
        return torch.cat([first, second, share], dim=-1)

    def logits(self, states: Tensor) -> Tensor:
        """Return log-probabilities of the mixture, float32: it is the probabilities that are mixed."""
        width = self.first.last.shape[-1]
        first, second, share = states[..., :width], states[..., width:-1], states[..., -1:].float()
        ours, theirs = self.first.lm.logits(first), self.second.lm.logits(second)
        # One of a family may have rows for padding that the other lacks.
        known = min(ours.shape[-1], theirs.shape[-1])
        logs = [part[..., :known].log_softmax(-1) for part in (ours, theirs)]
        return torch.logaddexp(logs[0] + (1 - share).log(), logs[1] + share.log())

    @torch.no_grad()
    def continuations(
        self, prompts: Tensor, room: Tensor, stops: Tensor, drafts: Sequence[Sequence[Sequence[int]]] = ()
    ) -> list[list[int]]:
        """Return the greedy continuation of each of ``prompts`` (numbers), up to a stop (included) or its ``room``.

        Each step reads what has been written anew, since answers are a few tokens long.
        """
        found = [[token] for token in self.logits(self.last[prompts]).argmax(-1).tolist()]
        live = list(range(len(found)))
        while True:
            live = [row for row in live if len(found[row]) < int(room[row]) and not bool(stops[row, found[row][-1]])]
            if not live:
                return found
            # Rows that are still running are equally long.
            states = self.states_behind(prompts[live], [found[row] for row in live])
            for row, token in zip(live, self.logits(states[:, -1]).argmax(-1).tolist(), strict=True):
                found[row].append(token)
