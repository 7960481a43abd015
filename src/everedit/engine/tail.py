"""Texts that have run up to one block, and run from there again and again: what lies below never changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.engine.beside import changed_mlp
from everedit.errors import NumericalError
from everedit.models import LanguageModel
from everedit.models.hooks import capture, resumed_after, stopping_at
from everedit.models.tokens import Batch, Encoded

__all__ = ["Tail"]


@dataclass
class Tail:
    """The states (n, length, H) of n texts that enter the block of ``layer``, and what is scored where.

    ``labels`` (places,) are predicted from the states at ``rows`` and ``columns``, and weigh ``shares``, which sum to 1
    so that each text counts the same.
    """

    lm: LanguageModel
    layer: int
    batch: Batch
    hidden: Tensor
    rows: Tensor
    columns: Tensor
    labels: Tensor
    shares: Tensor

    @classmethod
    def of(cls, lm: LanguageModel, texts: Sequence[Encoded], layer: int, *, bag: bool = False) -> Tail:
        """Run the blocks below ``layer`` on texts with targets, each token of which is scored at its own place.

        With ``bag`` all of a target's tokens are scored at the prompt's last one.
        """
        # The last target token is never an input; a bag of target tokens is scored behind the prompt alone.
        batch = lm.pad([text.ids[: text.prompt_end] if bag else text.ids[:-1] for text in texts])
        block = lm.layout.block(layer)
        with torch.no_grad(), capture(inputs={"in": block}, rows=len(texts)) as seen, stopping_at(block, before=True):
            lm.states(**batch.inputs())
        places = [
            (row, (text.prompt_end if bag else position) - 1, text.ids[position], 1 / len(text.target_ids) / len(texts))
            for row, text in enumerate(texts)
            for position in range(*text.target)
        ]
        rows, columns, labels, shares = (torch.tensor(values, device=lm.device) for values in zip(*places, strict=True))
        return cls(lm, layer, batch, seen["in"].clone(), rows, columns, labels, shares)

    def logits(self) -> Tensor:
        """Return the logits (places, vocabulary) at the scored places, with the upper blocks as they are now."""
        with ExitStack() as stack:
            below = [self.lm.layout.block(index) for index in range(self.layer)]
            if below:
                stack.enter_context(resumed_after(below, self.hidden, as_tuple=self.lm.blocks_return_tuples))
            states = self.lm.states(**self.batch.inputs())
        return self.lm.logits(states[self.rows, self.columns])

    def loss(self) -> Tensor:
        """Return the mean over the texts of each one's mean loss over its target tokens.

        Raises :class:`NumericalError` if it is not finite.
        """
        loss = (F.cross_entropy(self.logits(), self.labels, reduction="none") * self.shares).sum()
        self.require_finite(loss)
        return loss

    @staticmethod
    def require_finite(loss: Tensor) -> None:
        """Raise :class:`NumericalError` unless a loss is finite."""
        if not bool(torch.isfinite(loss.detach())):
            raise NumericalError(what="training met a loss that is not finite", fix="lower the learning rate (lr)")

    def changed(self, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AbstractContextManager[None]:
        """Let ``change(query, key, value)`` stand in for the layer's MLP: see :func:`changed_mlp`."""
        return changed_mlp(self.lm, self.layer, change, lambda: self.batch.ids.shape)
