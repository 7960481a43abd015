"""TIES: put changes of one matrix together by trimming small entries, electing signs, and averaging what agrees."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ties_merge"]


def ties_merge(changes: Tensor, kept: float, weights: Tensor | None = None) -> Tensor:
    """Return one change (…) for n of them (n, …) (Yadav et al., NeurIPS 2023, arXiv 2306.01708).

    Of each the ``kept`` share of entries largest by magnitude stays; each entry's sign is that of the weighted sum
    (zero counts as plus); the result is the weighted mean over those whose sign agrees. ``weights`` (n,) are equal if
    None.
    """
    flat = changes.flatten(1)
    shares = torch.full((len(flat), 1), 1 / len(flat)).to(flat) if weights is None else weights[:, None].to(flat)
    count = max(1, round(kept * flat.shape[1]))
    # The smallest magnitude that stays; entries of the same size stay too.
    limit = flat.abs().kthvalue(flat.shape[1] - count + 1, dim=1, keepdim=True).values
    trimmed = torch.where(flat.abs() >= limit, flat, 0.0)
    elected = torch.where((shares * trimmed).sum(0) >= 0, 1.0, -1.0)
    agrees = (trimmed * elected > 0).to(flat)
    total = (agrees * shares).sum(0)
    merged = (agrees * shares * trimmed).sum(0) / torch.where(total > 0, total, 1.0)
    return merged.view(changes.shape[1:])
