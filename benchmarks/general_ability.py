"""Whether a model still reads ordinary text: its loss on text that neither the statistics nor the edits have seen."""

from __future__ import annotations

from itertools import islice

import torch
from torch.nn import functional as F

from everedit.engine.moments import Corpus
from everedit.models import LanguageModel

WINDOWS, TOKENS = 16, 256


@torch.no_grad()
def text_loss(lm: LanguageModel, seen: Corpus) -> float:
    """Mean loss a token over windows that begin where ``seen`` ends."""
    behind = Corpus(seen.path, seen.tokens + (WINDOWS + 1) * TOKENS, TOKENS)
    windows = list(islice(behind.windows(lm), seen.tokens // TOKENS + 1, None))[:WINDOWS]
    losses = []
    for start in range(0, len(windows), 4):
        ids = torch.tensor(windows[start : start + 4], device=lm.device)
        states = lm.states(input_ids=ids)[:, :-1].flatten(0, 1)
        labels = ids[:, 1:].flatten()
        for part, label in zip(states.split(128), labels.split(128), strict=True):
            losses.append(F.cross_entropy(lm.logits(part), label, reduction="sum"))
    return float(torch.stack(losses).sum()) / sum(len(window) - 1 for window in windows)
