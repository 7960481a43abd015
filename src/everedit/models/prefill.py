"""Prompts that a model has run once, and what follows them: given texts to be read, or tokens it chooses itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from everedit.models.calls import decisions_of, keep_decisions
from everedit.models.encoded_prompts import EncodedPrompts
from everedit.models.model import LanguageModel

__all__ = ["Prefill", "held_cache", "prefilled"]

_LOGITS_A_CHUNK = 1 << 23


def held_cache(past: Sequence[tuple[Tensor, Tensor]], decisions: Mapping[str, Tensor] | None = None) -> DynamicCache:
    """Return a cache of each layer's keys and values without copying them; the model appends to copies of its own.

    ``decisions`` are what was decided for its rows (:mod:`everedit.models.calls`).
    """
    cache = DynamicCache()
    for keys, values in past:
        held = DynamicLayer()
        held.keys, held.values = keys, values
        held.dtype, held.device, held.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(held)
    keep_decisions(cache, decisions or {})
    return cache


@dataclass
class Prefill:
    """What is left of n prompts behind the model: keys and values by layer (n, heads, P, d), the mask (n, P) of
    real tokens, which end at the last column, the final states (n, H) of the last tokens, and what was decided for
    each prompt, (n, …).
    """

    lm: LanguageModel
    past: list[tuple[Tensor, Tensor]]
    mask: Tensor
    last: Tensor
    decisions: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LanguageModel, prompts: Sequence[Sequence[int]], shared: int = 0) -> Prefill:
        """Run prompts, rows of at least one id; the first ``shared`` ids, equal in all of them, run once."""
        whole = lm.pad(prompts, side="left")
        cache, inputs, mask = DynamicCache(), whole.inputs(), whole.mask
        if len(prompts) > 1 and min(map(len, prompts)) > shared > 0:
            lm.states(**lm.pad([prompts[0][:shared]]).inputs(), past_key_values=cache, use_cache=True)
            if decisions_of(cache):
                # What is decided from the beginning alone would not know the prompts.
                return cls.of(lm, prompts)
            cache = _begun(cache, whole.shift)
            inputs |= {name: inputs[name][:, shared:] for name in ("input_ids", "position_ids")}
        states = lm.states(**inputs, past_key_values=cache, use_cache=True)
        past = [(part.keys, part.values) for part in cache.layers]
        return cls(lm, past, mask, states[:, -1].clone(), dict(decisions_of(cache)))

    def _cache_of(self, prompts: Tensor) -> DynamicCache:
        decisions = {who: rows[prompts] for who, rows in self.decisions.items()}
        return held_cache([(keys[prompts], values[prompts]) for keys, values in self.past], decisions)

    @torch.no_grad()
    def states_behind(self, prompts: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the final states (texts, S, H) of ``texts``, each read behind the prompt of that number."""
        batch = self.lm.pad(texts)
        mask = self.mask[prompts]
        return self.lm.states(
            input_ids=batch.ids,
            attention_mask=torch.cat([mask, batch.mask], dim=1),
            position_ids=batch.positions + mask.sum(1, keepdim=True),
            past_key_values=self._cache_of(prompts),
            use_cache=True,
        )

    @torch.no_grad()
    def continuations(
        self, prompts: Tensor, room: Tensor, stops: Tensor, drafts: Sequence[Sequence[Sequence[int]]] = ()
    ) -> list[list[int]]:
        """Return the greedy continuation of each of ``prompts`` (numbers), up to a stop (included) or its ``room``.

        ``stops`` (rows, vocabulary) marks the tokens that end a row; a row that has ended is not run any more.
        ``drafts``, guesses for each row, change the time that it takes and nothing else: all tokens of a guess are
        run at once, and those that are the model's own choices are kept (Leviathan et al., ICML 2023, with a greedy
        model and the guesses in place of a smaller one).
        """
        mask, device = self.mask[prompts], self.mask.device
        cache = self._cache_of(prompts)
        tokens = self._choices(self.last[prompts])
        found = [[token] for token in tokens.tolist()]
        live = torch.arange(len(prompts), device=device)
        chunk = _guessed(found, drafts, room.tolist(), self.lm.pad_id, device) if drafts else None
        while True:
            ended = [bool(stops[row, found[row][-1]]) or len(found[row]) >= int(room[row]) for row in live.tolist()]
            rows = torch.tensor([not over for over in ended], device=device).nonzero()[:, 0]
            if not len(rows):
                return found
            if len(rows) < len(live):
                live, mask = live[rows], mask[rows]
                chunk = chunk if chunk is None else (chunk[0][rows], chunk[1][rows])
                cache.batch_select_indices(rows)
            if chunk is None:
                last = [[found[row][-1]] for row in live.tolist()]
                chunk = torch.tensor(last, device=device), torch.ones(len(live), 1, dtype=mask.dtype, device=device)
            ids, real = chunk
            states = self.lm.states(
                input_ids=ids,
                attention_mask=torch.cat([mask, real], dim=1),
                position_ids=mask.sum(1, keepdim=True) + (real.cumsum(1) - 1).clamp_min(0),
                past_key_values=cache,
                use_cache=True,
            )
            chosen = self._choices(states.flatten(0, 1)).view(ids.shape)
            # A guessed token stays if it is what the model chose behind the one before it, which stayed too.
            kept = torch.cat([real[:, :1], real[:, 1:] * (ids[:, 1:] == chosen[:, :-1])], dim=1).cumprod(1)
            mask = torch.cat([mask, kept], dim=1)
            for row, count, guess, choice in zip(
                live.tolist(), kept.sum(1).tolist(), ids.tolist(), chosen.tolist(), strict=True
            ):
                _extend(found[row], [*guess[1:count], choice[count - 1]], stops[row], int(room[row]))
            chunk = None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of some states."""
        return self.lm.logits(states)

    def _choices(self, states: Tensor) -> Tensor:
        """Return the most probable token behind each of some states (n, H), a bounded number of logits at a time."""
        step = max(1, _LOGITS_A_CHUNK // int(self.lm.model.config.vocab_size))
        return torch.cat([self.lm.logits(part).argmax(-1) for part in states.split(step)])


def prefilled(lm: LanguageModel, prompts: Sequence[Sequence[int]], shared: int = 0) -> Prefill | EncodedPrompts:
    """Run prompts through a model of either kind; of a decoder, ``shared`` first ids run once."""
    return Prefill.of(lm, prompts, shared) if lm.layout.is_decoder_only else EncodedPrompts.of(lm, prompts)


def _begun(cache: DynamicCache, shift: Tensor) -> DynamicCache:
    """Return the cache of rows that begin as the one row of ``cache``, each behind ``shift`` (rows,) columns of padding
    and cut at the same column: a hole between tokens would count as part of a sliding window.
    """
    columns = torch.arange(cache.get_seq_length(), device=shift.device)
    # What stands in the padding does not matter.
    tokens = (columns - shift[:, None]).clamp_min(0)
    past = [(part.keys[0][:, tokens], part.values[0][:, tokens]) for part in cache.layers]
    return held_cache([(keys.transpose(0, 1), values.transpose(0, 1)) for keys, values in past])


def _guessed(
    found: list[list[int]], drafts: Sequence[Sequence[Sequence[int]]], room: list[int], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the first chunk to run, (rows, S) ids and which are real: a guess that starts as the model did, if any."""
    chosen = [
        next((list(guess[:most]) for guess in guesses if guess and guess[0] == begun[0]), begun)
        for begun, guesses, most in zip(found, drafts, room, strict=True)
    ]
    width = max(map(len, chosen))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in chosen], device=device)
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in chosen], device=device)
    return ids, real


def _extend(row: list[int], more: Sequence[int], stops: Tensor, room: int) -> None:
    """Add tokens to a row until one of them ends it."""
    for token in more:
        row.append(token)
        if len(row) >= room or bool(stops[token]):
            return
