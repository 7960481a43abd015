"""What a forward pass is about: which tokens are real, whether a sequence begins, and what was decided for each row.

A decision that is made when a sequence begins, such as which memory answers it, holds until the sequence ends. It is
kept on the sequence's cache of keys and values, where it follows the rows through selection and beam search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from everedit.models.model import LanguageModel

__all__ = ["Call", "Watcher", "decisions_of", "keep_decisions", "watching"]

_NAME = "everedit_decisions"
_SELECTING = ("reorder_cache", "batch_select_indices")


@dataclass
class Call:
    """One forward pass over (rows, length) tokens; ``real`` (rows, length) is False on padding.

    ``begins`` is True where these are the first tokens of their sequences. ``ids`` (rows, length) are the tokens, None
    where a model was given embeddings.
    """

    real: Tensor
    begins: bool
    cache: Cache | None = None
    ids: Tensor | None = None
    _decided: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def last(self) -> Tensor:
        """The column of each row's last real token, (rows,)."""
        columns = torch.arange(self.real.shape[1], device=self.real.device)
        return (columns * self.real).argmax(1)

    def decided(self, who: str, decide: Callable[[], Tensor]) -> Tensor:
        """Return what ``who`` decided for these rows, (rows, …): now, by ``decide()``, if their sequences begin."""
        if who not in self._decided:
            kept = {} if self.begins else decisions_of(self.cache)
            self._decided[who] = kept[who] if who in kept else decide()
            if self.cache is not None and who not in kept:
                keep_decisions(self.cache, {who: self._decided[who]})
        return self._decided[who]


@dataclass
class Watcher:
    """Holds the call that is under way."""

    call: Call | None = None

    @property
    def now(self) -> Call:
        """The call that is under way."""
        assert self.call is not None
        return self.call


@contextmanager
def watching(lm: LanguageModel) -> Iterator[Watcher]:
    """Follow every forward pass of the model while the block runs."""
    watcher = Watcher()

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        rows, length = tokens.shape[:2]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        real = torch.ones(rows, length, dtype=torch.bool, device=tokens.device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -length:].bool()
        begins = not isinstance(cache, Cache) or cache.get_seq_length() == 0
        watcher.call = Call(real, begins, cache if isinstance(cache, Cache) else None, ids)

    def end(module: Any, args: Any, output: Any) -> None:
        made = getattr(output, "past_key_values", None)
        if watcher.call is not None and watcher.call.cache is None and isinstance(made, Cache):
            keep_decisions(made, watcher.call._decided)

    holder = lm.model.get_submodule(lm.layout.family.blocks.rpartition(".")[0])
    handles = [holder.register_forward_pre_hook(begin, with_kwargs=True), holder.register_forward_hook(end)]
    try:
        yield watcher
    finally:
        for handle in handles:
            handle.remove()


def decisions_of(cache: Cache | None) -> Mapping[str, Tensor]:
    """Return what has been decided for the rows of a cache, by who decided it."""
    return getattr(cache, _NAME, {})


def keep_decisions(cache: Cache, decisions: Mapping[str, Tensor]) -> None:
    """Keep decisions with the rows of a cache, wherever these go."""
    if not decisions:
        return
    if not hasattr(cache, _NAME):
        setattr(cache, _NAME, {})
        cache.__class__ = _following(type(cache))  # type: ignore[arg-type]
    getattr(cache, _NAME).update(decisions)


@lru_cache
def _following(kind: type[Any]) -> type[Any]:
    """Return a class of caches that takes its decisions along; a copy of such a cache does too."""

    def both(method: str, change: Any) -> Any:
        def run(self: Any, argument: Any) -> None:
            getattr(kind, method)(self, argument)
            kept = getattr(self, _NAME)
            kept.update({who: change(tensor, argument) for who, tensor in kept.items()})

        return run

    members = {name: both(name, lambda tensor, rows: tensor[rows.to(tensor.device)]) for name in _SELECTING}
    members["batch_repeat_interleave"] = both("batch_repeat_interleave", lambda t, n: t.repeat_interleave(n, dim=0))
    return type(kind.__name__, (kind,), members)
