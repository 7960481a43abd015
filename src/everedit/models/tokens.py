"""The only place that joins texts and turns them into token ids, spans, padding and positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from everedit.edit import subject_span
from everedit.errors import TokenError

__all__ = ["Batch", "Encoded", "encode", "join", "pad"]


@dataclass(frozen=True)
class Encoded:
    """A text as tokens. Spans are half-open token ranges; ``target`` holds every token after the prompt.

    ``prompt_end`` equals ``target[0]``: a token that straddles the border belongs to the target, since giving
    it with the prompt would give part of the answer.
    """

    text: str
    ids: tuple[int, ...]
    prompt_end: int
    subject: tuple[int, int] | None = None

    @property
    def target(self) -> tuple[int, int]:
        """The target's tokens."""
        return (self.prompt_end, len(self.ids))

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The ids of the target."""
        return self.ids[self.prompt_end :]

    @property
    def subject_last(self) -> int:
        """Index of the subject's last token."""
        assert self.subject is not None
        return self.subject[1] - 1


def join(prompt: str, target: str) -> str:
    """Return prompt and target as one text: one space between them unless there is white space already."""
    if not target or not prompt or prompt[-1].isspace() or target[0].isspace():
        return prompt + target
    return f"{prompt} {target}"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str = "",
    *,
    subject: str | None = None,
    prefix: str = "",
    max_tokens: int | None = None,
) -> Encoded:
    """Tokenise ``prefix + prompt + target`` as one text and locate the parts by character offsets.

    The subject is looked for in the prompt alone, so a prefix that names it does not mislead. Special tokens
    in front (BOS) are kept, those behind (EOS, SEP) dropped.

    Raises :class:`TokenError` if the subject is not in the prompt, a part has no token of its own, or the text
    is longer than ``max_tokens``.
    """
    text = join(prefix + prompt, target)
    ids, offsets = _tokenise(tokenizer, text)
    border = len(prefix + prompt)
    prompt_end = next((i for i, (start, end) in enumerate(offsets) if end > border and end > start), len(ids))
    if target and prompt_end == len(ids):
        raise TokenError(what="the target has no token of its own", where=repr(text), fix="give another target")
    if max_tokens is not None and len(ids) > max_tokens:
        raise TokenError(
            what=f"the text has {len(ids)} tokens and the model's context holds {max_tokens}",
            where=f"{text[:60]!r}…",
            fix="shorten the prompt or the target",
        )
    span = None
    if subject is not None:
        found = subject_span(prompt, subject)
        if found is None:
            raise TokenError(
                what=f"the subject {subject!r} does not occur in the prompt",
                where=repr(prompt),
                fix="write the subject as it stands in the prompt",
            )
        span = _overlapping(offsets, len(prefix) + found[0], len(prefix) + found[1], text)
    return Encoded(text, tuple(ids), prompt_end, span)


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise TokenError(
            what=f"{type(tokenizer).__name__} gives no character offsets",
            fix="use the model's fast tokenizer (a tokenizer.json in its folder)",
        )
    out = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, offsets, special = list(out["input_ids"]), list(out["offset_mapping"]), out["special_tokens_mask"]
    # Only special tokens that the tokenizer itself put at the end; one written in the text has an extent.
    while ids and special[len(ids) - 1] and offsets[-1][0] == offsets[-1][1]:
        ids.pop()
        offsets.pop()
    return ids, offsets


def _overlapping(offsets: list[tuple[int, int]], start: int, end: int, text: str) -> tuple[int, int]:
    inside = [i for i, (left, right) in enumerate(offsets) if left < end and right > start and right > left]
    if not inside:
        raise TokenError(what=f"no token covers {text[start:end]!r}", where=repr(text))
    return inside[0], inside[-1] + 1


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length: ``ids``, ``mask`` (1 on real tokens) and ``positions``, all (rows, length).

    ``shift[i]`` is what to add to a token index of row i to find its column.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    shift: Tensor

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a model's forward."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    side: str = "right",
    anchors: Sequence[int] | None = None,
    device: torch.device | None = None,
) -> Batch:
    """Pad rows of ids on the ``right`` or the ``left``, or on both sides so that ``anchors`` share a column.

    Positions count real tokens only, so a row means the same alone and in any batch.
    """
    lengths = [len(row) for row in rows]
    if anchors is not None:
        lead = [max(anchors) - anchor for anchor in anchors]
    elif side == "left":
        lead = [max(lengths) - length for length in lengths]
    elif side == "right":
        lead = [0] * len(rows)
    else:
        raise ValueError(f"side is 'left' or 'right', not {side!r}")
    width = max(start + length for start, length in zip(lead, lengths, strict=True))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, (row, start) in enumerate(zip(rows, lead, strict=True)):
        ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, start : start + len(row)] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    shift = torch.tensor(lead, dtype=torch.long)
    return Batch(ids.to(device), mask.to(device), positions.to(device), shift.to(device))
