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

__all__ = ["KeptStates", "Tail"]


class KeptStates:
    """States that enter a block, by the text's ids, as far as ``room`` bytes go."""

    def __init__(self, room: int = 1 << 29) -> None:
        self._room = room
        self._states: dict[tuple[int, ...], Tensor] = {}

    def states(self, lm: LanguageModel, inputs: Sequence[tuple[int, ...]], layer: int) -> Tensor:
        """Return the states (rows, length, H) of rows that are padded on the right; new rows are run together."""
        new = [row for row in dict.fromkeys(inputs) if row not in self._states]
        fresh = _run_below(lm, new, layer) if new else {}
        found = [self._states[row] if row in self._states else fresh[row] for row in inputs]
        for row, states in fresh.items():
            size = states.numel() * states.element_size()
            if size <= self._room:
                self._states[row] = states
                self._room -= size
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True)


@torch.no_grad()
def _run_below(lm: LanguageModel, rows: Sequence[tuple[int, ...]], layer: int) -> dict[tuple[int, ...], Tensor]:
    batch, block = lm.pad(rows), lm.layout.block(layer)
    with capture(inputs={"in": block}, rows=len(rows)) as seen, stopping_at(block, before=True):
        lm.states(**batch.inputs())
    return {row: seen["in"][index, : len(row)].clone() for index, row in enumerate(rows)}


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
    def of(
        cls,
        lm: LanguageModel,
        texts: Sequence[Encoded],
        layer: int,
        *,
        bag: bool = False,
        kept: KeptStates | None = None,
    ) -> Tail:
        """Run the blocks below ``layer`` on texts with targets, each token of which is scored at its own place.

        With ``bag`` all of a target's tokens are scored at the prompt's last one. Texts that were run before come from
        ``kept``, and new ones go there.
        """
        # The last target token is never an input; a bag of target tokens is scored behind the prompt alone.
        inputs = [text.ids[: text.prompt_end] if bag else text.ids[:-1] for text in texts]
        kept = kept or KeptStates()
        hidden = kept.states(lm, inputs, layer)
        places = [
            (row, (text.prompt_end if bag else position) - 1, text.ids[position], 1 / len(text.target_ids) / len(texts))
            for row, text in enumerate(texts)
            for position in range(*text.target)
        ]
        rows, columns, labels, shares = (torch.tensor(values, device=lm.device) for values in zip(*places, strict=True))
        return cls(lm, layer, lm.pad(inputs), hidden, rows, columns, labels, shares)

    def split(self, parts: int) -> list[Tail]:
        """Return the texts as ``parts`` tails of equally many."""
        size = len(self.batch) // parts
        return [self._rows(part * size, size) for part in range(parts)]

    def _rows(self, first: int, count: int) -> Tail:
        own, rows = slice(first, first + count), (self.rows >= first) & (self.rows < first + count)
        # No wider than the longest of these rows.
        batch = self.batch
        width = int(batch.mask[own].sum(1).max())
        part = Batch(batch.ids[own, :width], batch.mask[own, :width], batch.positions[own, :width], batch.shift[own])
        shares = self.shares[rows] * (len(batch) / count)
        places = self.rows[rows] - first, self.columns[rows], self.labels[rows], shares
        return Tail(self.lm, self.layer, part, self.hidden[own, :width], *places)

    def logits(self) -> Tensor:
        """Return the logits (places, vocabulary) at the scored places, with the upper blocks as they are now."""
        return self.lm.logits(self.states()[self.rows, self.columns])

    def states(self) -> Tensor:
        """Return the final states (n, length, H), with the upper blocks as they are now."""
        with ExitStack() as stack:
            below = [self.lm.layout.block(index) for index in range(self.layer)]
            if below:
                stack.enter_context(resumed_after(below, self.hidden, as_tuple=self.lm.blocks_return_tuples))
            return self.lm.states(**self.batch.inputs())

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
