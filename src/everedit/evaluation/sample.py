"""Texts drawn at random for the scores of fluency and consistency: each row has a seed of its own."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from everedit.errors import TokenError
from everedit.models import LanguageModel

__all__ = ["require_room_to_sample", "samples"]

_TOKENS_IN_ALL, _TOP_K, _ROWS = 100, 5, 32


def samples(lm: LanguageModel, prompts: Sequence[str], seed: int) -> dict[str, str]:
    """Return what is written behind each prompt, drawn from the 5 most probable tokens, up to 100 tokens in all.

    A text depends on its prompt and on ``seed``, not on the other prompts.
    """
    by_room: dict[int, list[str]] = defaultdict(list)
    for prompt in dict.fromkeys(prompts):
        by_room[_room(lm, prompt)].append(prompt)
    found: dict[str, str] = {}
    for room, group in by_room.items():
        for start in range(0, len(group), _ROWS):
            part = group[start : start + _ROWS]
            seeds = [_seed(seed, prompt) for prompt in part]
            texts = lm.generate(part, max_new_tokens=room, min_new_tokens=room, top_k=_TOP_K, seed=seeds)
            found |= dict(zip(part, texts, strict=True))
    return found


def require_room_to_sample(lm: LanguageModel, prompt: str) -> None:
    """Raise :class:`TokenError` unless a prompt leaves room for a text of 100 tokens in all."""
    _room(lm, prompt)


def _room(lm: LanguageModel, prompt: str) -> int:
    room = min(_TOKENS_IN_ALL, lm.context_tokens) - len(lm.encode(prompt).ids)
    if room < 1:
        raise TokenError(
            what=f"a generation prompt of {_TOKENS_IN_ALL - room} tokens leaves no room in a text of {_TOKENS_IN_ALL}",
            where=f"{prompt[:60]!r}…",
            fix="shorten the prompt",
        )
    return room


def _seed(seed: int, prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}|{prompt}".encode()).digest()[:7], "big")
