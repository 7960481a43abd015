"""A fast tokenizer as GGUF's metadata: byte-level BPE in the ways that llama.cpp knows by name, and SentencePiece."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from everedit.errors import NotApplicable

__all__ = ["describe_tokenizer"]

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_BYTE_LEVEL: dict[str, tuple[str, bool]] = {
    "": ("gpt-2", False),
    "digits": ("smollm", False),
    _LLAMA_3: ("llama-bpe", True),
    _LLAMA_3.replace("{1,3}", ""): ("qwen2", False),
}
"""By how texts are split before the merges: llama.cpp's name for it, and whether whole words need no merges."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def describe_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocabulary: int, otherwise: str) -> None:
    """Write a tokenizer, ``vocabulary`` ids of it, through a GGUF writer.

    Raises :class:`NotApplicable`, with ``otherwise`` as what to do, for one that llama.cpp does not know.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    kind = _byte_level(described) if model["type"] == "BPE" else None
    pieces = kind is None and _is_sentencepiece(described)
    if kind is None and not pieces:
        raise NotApplicable(what="llama.cpp knows no tokenizer like the model's", fix=otherwise)
    tokens, types = _tokens(tokenizer, described, vocabulary)
    if kind is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, types, model["merges"], otherwise))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _describe_specials(writer, tokenizer)
    writer.add_add_space_prefix(pieces and _adds_space(described))


def _describe_specials(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _byte_level(described: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for a byte-level BPE's way to split texts; None if it has none."""
    split = described["pre_tokenizer"] or {}
    steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    last, normalized = steps[-1], described["normalizer"] not in (None, {"type": "NFC"})
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or normalized:
        return None
    before = "".join(_step(step) for step in steps[:-1])
    name, whole_words = _BYTE_LEVEL.get(before, ("", False))
    plain = not before or before == "digits"
    same = last["use_regex"] == plain and bool(described["model"].get("ignore_merges")) == whole_words
    return name if name and same else None


def _step(step: dict[str, Any]) -> str:
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", "?"))
    return "?"


def _is_sentencepiece(described: dict[str, Any]) -> bool:
    """Whether it is a BPE as SentencePiece has it: spaces are letters, and unknown letters are bytes."""
    model = described["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback")) and _spaces(described) is not None


def _spaces(described: dict[str, Any]) -> bool | None:
    """Return whether a text begins with a space of its own; None if spaces are not turned into letters as expected."""
    normalizer, split = described["normalizer"], described["pre_tokenizer"]
    if normalizer is None and split is not None and split["type"] == "Metaspace" and not split.get("split", True):
        return split["prepend_scheme"] != "never"
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    kinds = [(step["type"], step.get("prepend") or step.get("content")) for step in steps]
    if split is None and kinds in ([("Prepend", "▁"), ("Replace", "▁")], [("Replace", "▁")]):
        return len(kinds) == 2
    return None


def _adds_space(described: dict[str, Any]) -> bool:
    return bool(_spaces(described))


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _tokens(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], vocabulary: int
) -> tuple[list[str], list[int]]:
    """Return every id's token and its type; ids that the tokenizer does not use are named as such."""
    added = {token["id"]: token for token in described["added_tokens"]}
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    unknown = described["model"].get("unk_token")
    tokens, types = [], []
    for number in range(vocabulary):
        token = by_id.get(number)
        tokens.append(f"[unused {number}]" if token is None else token)
        if token is None:
            types.append(_UNUSED)
        elif token == unknown:
            types.append(_UNKNOWN)
        elif number in added:
            types.append(_CONTROL if added[number]["special"] else _USER_DEFINED)
        elif described["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types.append(_BYTE)
        else:
            types.append(_NORMAL)
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[Any], otherwise: str) -> list[float]:
    """Return scores that make SentencePiece merge in the order of the merges: it takes the best first."""
    best: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        best.setdefault("".join(_pair(merge)), -float(rank))
    for token, kind in zip(tokens, types, strict=True):
        if kind == _NORMAL and len(token) > 1 and token not in best:
            raise NotApplicable(what=f"the tokenizer's token {token!r} comes from no merge", fix=otherwise)
    # Letters are what is merged: no merge makes them, and their score is never looked at.
    return [best.get(token, 0.0) for token in tokens]
