"""Does a model hold a fact true? Contrastive knowledge assessment (Dong et al., Findings of EMNLP 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from everedit.models import LanguageModel
from everedit.models.prefill import prefilled

__all__ = ["contrastive_assessment"]


def contrastive_assessment(
    lm: LanguageModel, prompt: str, negatives: Sequence[str], answer: str, *, a: float = 0.0, b: float = 0.0
) -> float:
    """Return (P(o | prompt) + a) / (mean of P(o | negative prompt) + b) for the answer's first token o.

    Below 1 the fact counts as false. ``negatives`` state other relations of the same subject; ``a`` and ``b`` are the
    paper's smoothing, which its code leaves out.
    """
    texts = [lm.encode(text, answer) for text in (prompt, *negatives)]
    prefill = prefilled(lm, [text.ids[: text.prompt_end] for text in texts])
    tokens = torch.tensor([[text.target_ids[-1]] for text in texts], device=lm.device)
    likely = lm.logits(prefill.last).softmax(-1).gather(1, tokens)[:, 0]
    return float((likely[0] + a) / (likely[1:].mean() + b))
