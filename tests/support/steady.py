"""A tiny model that is the same wherever it is made: for ledgers that were written long ago."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from everedit.models import LanguageModel

WORDS = [
    "the",
    "a",
    "of",
    "in",
    "is",
    "was",
    "town",
    "river",
    "house",
    "road",
    "lies",
    "flows",
    "stands",
    "Oslo",
    "Lima",
    "Cairo",
    "Kyoto",
    "Norn",
    "Alta",
    "Bele",
    "Cori",
]


def steady_model() -> LanguageModel:
    """Return a model whose weights are whole numbers in a thousand: no machine rounds them otherwise."""
    vocabulary = {word: index for index, word in enumerate(["<end>", *WORDS])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(vocabulary), eos_token="<end>", unk_token="<end>", pad_token="<end>"
    )
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).float()
    state = 1
    for name, weight in sorted(model.named_parameters()):
        values = []
        for _ in range(weight.numel()):
            # The generator of Park and Miller: one line, the same in every library and version.
            state = state * 48271 % 2147483647
            values.append((state % 601 - 300) / 1000 + (1.0 if name.endswith("ln_1.weight") else 0.0))
        weight.data = torch.tensor(values, dtype=torch.float64).view(weight.shape).float()
    return LanguageModel("steady", model, tokenizer)


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def expected(folder: Path) -> dict[str, dict[str, str]]:
    """Return what an old ledger came to when it was written: the hashes of its states, by the number of the commit."""
    found: dict[str, dict[str, str]] = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return found
