"""What a model says: teacher-forced readings and free generations, batched, with logits only where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from everedit.errors import TokenError
from everedit.models import LanguageModel

__all__ = ["Reading", "generate", "read", "require_room"]

_TOKENS_A_BATCH = 2048
_LOGITS_A_CHUNK = 1 << 23
_SPARE_TOKENS = 6
_MOST_NEW_TOKENS = 50
_ROWS_A_GENERATION = 64


@dataclass(frozen=True)
class Reading:
    """A target as the model reads it behind its prompt: its tokens, the model's own first choices, the mean NLL."""

    target: tuple[int, ...]
    predicted: tuple[int, ...]
    nll: float


@torch.no_grad()
def read(lm: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[Reading]:
    """Return a reading of each (prompt, target); equal pairs are computed once.

    Rows of like length share a batch, and only the positions that predict a target token are projected to the
    vocabulary.
    """
    unique = list(dict.fromkeys(pairs))
    rows = [lm.encode(prompt, target) for prompt, target in unique]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    found: dict[tuple[str, str], Reading] = {}
    start = 0
    while start < len(order):
        stop = start + 1
        # Sorted by length: the last row of a batch is its longest.
        while stop < len(order) and (stop + 1 - start) * len(rows[order[stop]].ids) <= _TOKENS_A_BATCH:
            stop += 1
        members = order[start:stop]
        batch = lm.pad([rows[index].ids[:-1] for index in members])
        states = lm.states(**batch.inputs())
        places = [(line, position - 1) for line, index in enumerate(members) for position in range(*rows[index].target)]
        labels = torch.tensor([token for index in members for token in rows[index].target_ids], device=lm.device)
        at = torch.tensor(places, device=lm.device)
        chosen, losses = _score(lm, states[at[:, 0], at[:, 1]], labels)
        offset = 0
        for index in members:
            end = offset + len(rows[index].target_ids)
            nll = sum(losses[offset:end]) / (end - offset)
            found[unique[index]] = Reading(rows[index].target_ids, tuple(chosen[offset:end]), nll)
            offset = end
        start = stop
    return [found[pair] for pair in pairs]


def _score(lm: LanguageModel, states: torch.Tensor, labels: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return arg-max tokens and losses at the given states (n, H), a bounded number of logits at a time."""
    step = max(1, _LOGITS_A_CHUNK // lm.model.config.vocab_size)
    chosen: list[int] = []
    losses: list[float] = []
    for start in range(0, len(labels), step):
        logits = lm.logits(states[start : start + step])
        chosen += logits.argmax(-1).tolist()
        losses += F.cross_entropy(logits, labels[start : start + step], reduction="none").tolist()
    return chosen, losses


def generate(lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return each prompt's greedy continuation up to its natural stop: full stop, line break or end token.

    A row may be a few tokens longer than its target and no more: a text that has not stopped by then cannot be
    the target. Where the target itself holds a full stop, only line breaks and the end token stop.
    """
    unique = list(dict.fromkeys(zip(prompts, targets, strict=True)))
    rows = [lm.encode(prompt).ids for prompt, _ in unique]
    room = [_room(lm, prompt, target) for prompt, target in unique]
    breaks, stops = _stop_ids(lm)
    texts: dict[tuple[str, str], str] = {}
    for dotted in (False, True):
        group = [index for index, (_, target) in enumerate(unique) if ("." in target) == dotted]
        group.sort(key=lambda index: (room[index], len(rows[index])))
        while group:
            members = group[: _fitting(lm, [(len(rows[index]), room[index]) for index in group])]
            group = group[len(members) :]
            new = lm.generate_ids(
                [rows[index] for index in members],
                max_new_tokens=max(room[index] for index in members),
                stop_ids=breaks if dotted else [*breaks, *stops],
            )
            for index, ids in zip(members, new, strict=True):
                texts[unique[index]] = str(lm.tokenizer.decode(ids[: room[index]], skip_special_tokens=True))
    return [texts[pair] for pair in zip(prompts, targets, strict=True)]


def require_room(lm: LanguageModel, prompt: str, target: str) -> None:
    """Raise :class:`TokenError` unless the model's context holds a prompt and all that may be generated behind it."""
    tokens = len(lm.encode(prompt).ids) + _room(lm, prompt, target)
    if tokens > lm.context_tokens:
        raise TokenError(
            what=f"prompt and answer may take {tokens} tokens and the model's context holds {lm.context_tokens}",
            where=f"{prompt[:60]!r}…",
            fix="shorten the prompt",
        )


def _room(lm: LanguageModel, prompt: str, target: str) -> int:
    return min(_MOST_NEW_TOKENS, len(lm.encode(prompt, target).target_ids) + _SPARE_TOKENS)


def _fitting(lm: LanguageModel, sizes: Sequence[tuple[int, int]]) -> int:
    """Return how many rows of (length, room), by ascending room, can be continued together."""
    longest = 0
    for count, (length, room) in enumerate(sizes[:_ROWS_A_GENERATION]):
        longest = max(longest, length)
        if count and longest + room > lm.context_tokens:
            return count
    return min(len(sizes), _ROWS_A_GENERATION)


def _stop_ids(lm: LanguageModel) -> tuple[list[int], list[int]]:
    """Return the ids of tokens that hold a line break, and of those that end in a full stop."""
    # Byte-level vocabularies write the line break as "Ċ", SentencePiece's byte fallback as <0x0A>.
    vocabulary = lm.tokenizer.get_vocab().items()
    breaks = [index for token, index in vocabulary if "\n" in token or "Ċ" in token or token == "<0x0A>"]
    stops = [index for token, index in vocabulary if token.endswith(".")]
    return breaks, stops
