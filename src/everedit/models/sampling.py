"""How generated rows are drawn and where they end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

__all__ = ["Sampler", "cut"]


def cut(row: list[int], ends: set[int]) -> list[int]:
    """Return a row up to its first end token, which is included."""
    stop = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: stop + 1]


class Sampler(LogitsProcessor):
    """Draws each row's token by inverse transform and leaves it as the only one for the greedy choice.

    ``torch.multinomial`` draws a random number for every entry of the vocabulary; this draws one a row, from a
    generator of its own. With a seed for each row, a row's text does not depend on the other rows.
    """

    def __init__(self, top_k: int, seed: int | Sequence[int]) -> None:
        self._top_k = top_k
        self._random = [torch.Generator().manual_seed(one) for one in ([seed] if isinstance(seed, int) else seed)]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) that leave one token to each row."""
        ranked, tokens = scores.topk(self._top_k) if self._top_k else (scores, None)
        mass = ranked.float().softmax(-1).cumsum(-1)
        rows = len(scores) // len(self._random)
        drawn = torch.cat([torch.rand(rows, 1, generator=random) for random in self._random])
        draw = drawn.to(mass.device) * mass[:, -1:]
        chosen = torch.searchsorted(mass, draw, right=True).clamp_max(mass.shape[-1] - 1)
        if tokens is not None:
            chosen = tokens.gather(-1, chosen)
        return torch.full_like(scores, float("-inf")).scatter(-1, chosen, 0.0)
