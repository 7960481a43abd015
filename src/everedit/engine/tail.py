"""Texts that have run up to one block, and run from there again and again: what lies below never changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from everedit.engine.beside import changed_mlp
from everedit.engine.token_losses import token_losses
from everedit.errors import NumericalError
from everedit.models import LanguageModel
from everedit.models.forced import Forced, input_rows
from everedit.models.hooks import capture, only_at, resumed_after, stopping_at
from everedit.models.tokens import Encoded

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
    """Texts with targets, as ``forced`` reads them, and the states (n, length, H) that enter the block of ``layer``.

    An encoder-decoder runs as a whole, ``hidden`` is None: its encoder may change too, and its decoder's blocks hand
    each other more than states.
    """

    lm: LanguageModel
    layer: int
    forced: Forced
    hidden: Tensor | None

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
        hidden = None
        if lm.layout.is_decoder_only:
            hidden = (kept or KeptStates()).states(lm, input_rows(texts, bag=bag), layer)
        return cls(lm, layer, Forced.of(lm, texts, bag=bag), hidden)

    @classmethod
    def several(
        cls, lm: LanguageModel, groups: Sequence[Sequence[Encoded]], layer: int, kept: KeptStates
    ) -> list[Tail]:
        """Return a tail of each group of texts; those that are new run in one pass."""
        if lm.layout.is_decoder_only:
            kept.states(lm, [row for texts in groups for row in input_rows(texts)], layer)
        return [cls.of(lm, texts, layer, kept=kept) for texts in groups]

    def __len__(self) -> int:
        return len(self.forced)

    @property
    def labels(self) -> Tensor:
        """The target tokens, (places,)."""
        return self.forced.labels

    def logits(self) -> Tensor:
        """Return the logits (places, vocabulary) at the scored places, with the upper blocks as they are now."""
        return self.lm.logits(self.states()[self.forced.rows, self.forced.columns])

    def states(self) -> Tensor:
        """Return the final states (n, length, H), with the upper blocks as they are now."""
        with ExitStack() as stack:
            if self.layer and self.hidden is not None:
                below = [self.lm.layout.block(index) for index in range(self.layer)]
                stack.enter_context(resumed_after(below, self.hidden, as_tuple=self.lm.blocks_return_tuples))
            return self.lm.states(**self.forced.inputs)

    def losses(self) -> Tensor:
        """Return each scored place's loss, (places,), whose gradient stops at the weights that make the logits."""
        with self._last_mlp():
            states = self.states()[self.forced.rows, self.forced.columns]
        return token_losses(self.lm, states, self.labels)[0]

    def _last_mlp(self) -> AbstractContextManager[None]:
        """Let the last block's MLP, behind which positions do not meet any more, run only where tokens are scored."""
        last = self.lm.layout.n_layers - 1
        mlp = self.lm.layout.mlp(last)
        if self.hidden is None or mlp is None or self.layer == last:
            return nullcontext()
        places = torch.zeros_like(self.forced.real)
        places[self.forced.rows, self.forced.columns] = True
        return only_at(mlp, places)

    def loss(self) -> Tensor:
        """Return the mean over the texts of each one's mean loss over its target tokens.

        Raises :class:`NumericalError` if it is not finite.
        """
        loss = (self.losses() * self.forced.shares).sum()
        self.require_finite(loss)
        return loss

    @staticmethod
    def require_finite(loss: Tensor) -> None:
        """Raise :class:`NumericalError` unless a loss is finite."""
        if not bool(torch.isfinite(loss.detach())):
            raise NumericalError(what="training met a loss that is not finite", fix="lower the learning rate (lr)")

    def changed(self, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AbstractContextManager[None]:
        """Let ``change(query, key, value)`` stand in for the layer's MLP: see :func:`changed_mlp`."""
        return changed_mlp(self.lm, self.layer, change, lambda: self.forced.real.shape)
