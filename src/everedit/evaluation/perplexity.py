"""Perplexity on ordinary text: exp of the mean loss a token, each text read in windows of the model's context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from everedit.errors import EditError
from everedit.models import LanguageModel

__all__ = ["Perplexity", "perplexity"]

_LARGEST = 700.0


@dataclass(frozen=True)
class Perplexity:
    """The ``value``, infinite where it is too large for a number, over the ``tokens`` that were predicted."""

    value: float
    tokens: int


@torch.no_grad()
def perplexity(lm: LanguageModel, texts: Sequence[str], window_tokens: int = 512) -> Perplexity:
    """Return a decoder's perplexity on ``texts``, as it is now.

    A window's first token is given and not predicted. Raises :class:`EditError` if there is no token to predict, and
    :class:`NotApplicable` for an encoder-decoder, which does not continue texts.
    """
    lm.layout.require_decoder_only("perplexity")
    window = min(window_tokens, lm.context_tokens)
    loss, tokens = 0.0, 0
    for text in texts:
        ids = lm.tokenizer(text, verbose=False)["input_ids"]
        # A window begins with the token that the one before it predicted last.
        for start in range(0, len(ids) - 1, window - 1):
            batch = lm.pad([ids[start : start + window]])
            states = lm.states(**batch.inputs())[0, :-1]
            for part, labels in zip(states.split(128), batch.ids[0, 1:].split(128), strict=True):
                loss += float(F.cross_entropy(lm.logits(part), labels, reduction="sum"))
            tokens += len(states)
    if not tokens:
        raise EditError(what="the text has no token to predict", fix="give a text of at least two tokens")
    mean = loss / tokens
    return Perplexity(math.exp(mean) if mean < _LARGEST else math.inf, tokens)
