"""Rows of a value optimisation that advance together, and the places where their vectors can be added."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.models import LanguageModel
from everedit.models.hooks import changed_output, only_at, replaced_input, resumed_after
from everedit.models.prefill import held_cache

__all__ = ["Lane", "Onward", "Reads", "TwoPlaces"]


@dataclass
class Reads:
    """Positions whose logits are needed: row, column, the token to score, and its weight in the edit's loss."""

    rows: Tensor
    columns: Tensor
    labels: Tensor
    weights: Tensor

    def keep(self, kept_rows: Tensor, n_rows: int) -> Reads:
        """Return the reads of some rows, renumbered."""
        place = torch.full((n_rows,), -1, device=kept_rows.device)
        place[kept_rows] = torch.arange(len(kept_rows), device=kept_rows.device)
        inside = place[self.rows] >= 0
        return Reads(place[self.rows][inside], self.columns[inside], self.labels[inside], self.weights[inside])


@dataclass
class Lane:
    """A group of rows with column 0 at the subject's last token t, which resume behind block L.

    ``hidden`` (rows, S, H) is block L's output from t on; ``past`` the keys and values before t by layer; ``mask``
    (rows, P + S) and ``positions`` (rows, S) as the model takes them; ``owner`` the edit of each row; ``origin``
    (rows, places, H) what stands where vectors are added. ``mlp`` and ``rest`` (rows, H) split block L's output at t
    where a norm stands behind the MLP; ``added`` (rows, H) is the MLP's part of it. A lane scores its ``reads``; of
    the rows marked in ``essence`` it keeps the next-token distribution at t.
    """

    layer: int
    hidden: Tensor
    past: list[tuple[Tensor, Tensor]]
    mask: Tensor
    positions: Tensor
    owner: Tensor
    bare: Tensor
    essence: Tensor
    prefixes: int
    origin: Tensor
    added: Tensor
    reads: Reads
    mlp: Tensor | None = None
    rest: Tensor | None = None
    initial: Tensor | None = None

    def put_origins(self, origins: Tensor, before: Tensor) -> None:
        """Fill in, behind the empty prefix, values at t (edits, places, H) and what the MLP added there (edits, H)."""
        origins[self.owner[self.bare]] = self.origin[self.bare]
        before[self.owner[self.bare]] = self.added[self.bare]

    def states_read(self, lm: LanguageModel, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the final states at t of the essence rows, and those that predict the target, (n, H) each, given
        ``delta`` (edits, places, H).
        """
        states = self._forward(lm, delta[self.owner])
        return states[self.essence, 0], states[self.reads.rows, self.reads.columns]

    def add_divergence(self, logits: Tensor, kl: Tensor) -> None:
        """Add each edit's divergence from its first distribution to ``kl``, from the essence rows' logits."""
        if not len(logits):
            return
        logs = F.log_softmax(logits, dim=-1)
        if self.initial is None:
            self.initial = logs.detach()
        kl.index_add_(0, self.owner[self.essence], (logs.exp() * (logs - self.initial)).sum(-1))

    def add_losses(self, losses: Tensor, chosen: Tensor, nll: Tensor, probability: Tensor, unsaid: Tensor) -> None:
        """Add this lane's terms for each edit to ``nll``, ``probability`` and ``unsaid``, the number of target tokens
        that are not the model's first choice, from its reads' losses and those choices.
        """
        at = self.reads
        # First each row's mean over its target, then the mean over an edit's rows.
        rows = torch.zeros(len(self.owner), device=losses.device).index_add(0, at.rows, losses * at.weights)
        scored = (~self.essence).nonzero()[:, 0]
        owner = self.owner[scored]
        nll.index_add_(0, owner, rows[scored] / self.prefixes)
        probability.index_add_(0, owner, (-rows.detach()[scored]).exp() / self.prefixes)
        unsaid.index_add_(0, self.owner[at.rows], (chosen != at.labels).to(unsaid.dtype))

    def _forward(self, lm: LanguageModel, delta: Tensor) -> Tensor:
        """Return the final states (rows, S, H), given each row's ``delta`` (rows, places, H)."""
        added, first = delta[:, 0], self.hidden[:, 0].float()
        if self.mlp is None or self.rest is None:
            moved = first + added
        else:
            norm = lm.layout.mlp_norm(self.layer)
            assert norm is not None
            moved = self.rest + norm((self.mlp + added).to(self.hidden.dtype)).float()
        return self._resume(lm, torch.cat([moved.to(self.hidden.dtype)[:, None], self.hidden[:, 1:]], dim=1))

    def _resume(self, lm: LanguageModel, hidden: Tensor) -> Tensor:
        blocks = [lm.layout.block(index) for index in range(self.layer + 1)]
        skipping = resumed_after(blocks, hidden, as_tuple=lm.blocks_return_tuples)
        # With nothing to skip the first block gets its input by itself: the model would add positions a second time.
        with skipping if blocks else replaced_input(lm.layout.block(0), hidden), self._last_mlp(lm):
            return lm.states(
                inputs_embeds=hidden.detach(),
                attention_mask=self.mask,
                position_ids=self.positions,
                # Layers up to this one are not run: layer 0 stands in for them, only to tell how long the past is.
                past_key_values=held_cache([self.past[0]] * (self.layer + 1) + self.past[1:]),
                use_cache=True,
            )

    def _last_mlp(self, lm: LanguageModel) -> AbstractContextManager[None]:
        """Let the last block's MLP, behind which positions do not meet any more, run only where states are read."""
        last = lm.layout.n_layers - 1
        mlp = lm.layout.mlp(last)
        if mlp is None or self.layer == last:
            return nullcontext()
        places = torch.zeros(self.hidden.shape[:2], dtype=torch.bool, device=self.hidden.device)
        places[self.essence, 0] = True
        places[self.reads.rows, self.reads.columns] = True
        return only_at(mlp, places)

    def keep(self, edits: Tensor) -> Lane:
        """Return the lane with only the rows of some edits, renumbered in the given order."""
        place = torch.full((1 + int(max(self.owner.max(), edits.max())),), -1, device=edits.device)
        place[edits] = torch.arange(len(edits), device=edits.device)
        kept = place[self.owner] >= 0
        rows = kept.nonzero()[:, 0]

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return replace(
            self,
            hidden=self.hidden[rows],
            past=[(keys[rows], values[rows]) for keys, values in self.past],
            mask=self.mask[rows],
            positions=self.positions[rows],
            owner=place[self.owner][rows],
            bare=self.bare[rows],
            essence=self.essence[rows],
            origin=self.origin[rows],
            added=self.added[rows],
            reads=self.reads.keep(rows, len(self.owner)),
            mlp=pick(self.mlp),
            rest=pick(self.rest),
            initial=None if self.initial is None else self.initial[kept[self.essence]],
        )


class TwoPlaces(Lane):
    """A lane whose vectors are added to the outputs of attention and MLP in the block behind which it stands.

    A change of the attention's output reaches the MLP too, so that this block runs again at each step.
    """

    def _forward(self, lm: LanguageModel, delta: Tensor) -> Tensor:
        def adding(vector: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            def change(_: Tensor, output: Tensor) -> Tensor:
                whole = output.view(*self.hidden.shape[:2], -1)
                moved = whole[:, :1] + vector[:, None].to(output.dtype)
                return torch.cat([moved, whole[:, 1:]], dim=1).view_as(output)

            return change

        layout, block = lm.layout, self.layer + 1
        # Found out by a run of its own at the first call, which must not meet the changes below.
        _ = lm.blocks_return_tuples
        with (
            changed_output(layout.attention_out(block), adding(delta[:, 0])),
            changed_output(layout.mlp_out(block), adding(delta[:, 1])),
        ):
            return self._resume(lm, self.hidden)


class Onward(Lane):
    """A lane whose vector is added to block L's output at t and at every token behind it (marginalia.md, "Writing")."""

    def _forward(self, lm: LanguageModel, delta: Tensor) -> Tensor:
        return self._resume(lm, (self.hidden.float() + delta).to(self.hidden.dtype))
