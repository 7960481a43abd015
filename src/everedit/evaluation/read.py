"""What a model says: teacher-forced readings and free generations, batched, with logits only where they are read.

Every prompt runs once; the answers to be read behind it and the text that the model writes itself start from its
keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.errors import TokenError
from everedit.evaluation.asked import Asked, Ids, Pair, Prompt, Ran, batches, ran
from everedit.models import LanguageModel

__all__ = ["Reading", "answers", "generate", "line_breaks", "read", "read_ids", "require_room"]

_TOKENS_A_BATCH = 2048
_LOGITS_A_CHUNK = 1 << 23
_SPARE_TOKENS = 6
_MOST_NEW_TOKENS = 50
_ROWS_A_GENERATION = 64


@dataclass(frozen=True)
class Reading:
    """A target as the model reads it behind its prompt: its tokens, the model's own first choices, the mean NLL."""

    target: Ids
    predicted: Ids
    nll: float


def read(lm: LanguageModel, pairs: Sequence[Pair]) -> list[Reading]:
    """Return a reading of each (prompt, target); equal pairs are computed once."""
    found = answers(lm, pairs, [])[0]
    return [found[pair] for pair in pairs]


def read_ids(lm: LanguageModel, rows: Sequence[tuple[Ids, Ids]]) -> list[Reading]:
    """Return a reading of each target behind its prompt, both as token ids, at least one of each.

    A prompt runs once for all of its targets, and a long beginning once for all prompts that share it.
    """
    prompts: dict[Ids, Prompt] = {}
    for ids, target in rows:
        prompts.setdefault(ids, Prompt(lm, ids)).read[ids, target] = target
    found: dict[Any, Reading] = {}
    for batch in batches(list(prompts.values()), _TOKENS_A_BATCH):
        found |= _readings(ran(batch), batch)
    return [found[row] for row in rows]


def generate(lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return each prompt's greedy continuation up to its natural stop: full stop, line break or end token.

    A row may be a few tokens longer than its target and no more: a text that has not stopped by then cannot be
    the target. Where the target itself holds a full stop, only line breaks and the end token stop.
    """
    pairs = list(zip(prompts, targets, strict=True))
    found = answers(lm, [], pairs)[1]
    return [found[pair] for pair in pairs]


def answers(
    lm: LanguageModel,
    to_read: Sequence[Pair],
    to_write: Sequence[Pair],
    guesses: Callable[[Pair], Sequence[str]] = lambda pair: (),
) -> tuple[dict[Pair, Reading], dict[Pair, str]]:
    """Return the readings of ``to_read`` and the texts written freely (:func:`generate`) for ``to_write``.

    A text without a target to compare with may be 50 tokens long. ``guesses`` are texts that might be written for a
    pair: they cost little, and each that is right saves much.
    """
    prompts = Asked(lm, [*to_read, *to_write], _room)
    for pair in dict.fromkeys(to_read):
        prompts.read(pair)
    for pair in dict.fromkeys(to_write):
        prompts.write(pair, guesses(pair))
    readings: dict[Pair, Reading] = {}
    texts: dict[Pair, str] = {}
    stops: dict[LanguageModel, _Stops] = {}
    for batch in batches(prompts.prompts, _TOKENS_A_BATCH):
        prefill = ran(batch)
        readings |= _readings(prefill, batch)
        if to_write:
            if prefill.lm not in stops:
                stops[prefill.lm] = _Stops(prefill.lm)
            texts |= _texts(prefill, batch, stops[prefill.lm])
    return readings, texts


def _readings(prefill: Ran, prompts: Sequence[Prompt]) -> dict[Any, Reading]:
    device = prefill.last.device
    rows = [(number, pair, ids) for number, prompt in enumerate(prompts) for pair, ids in prompt.read.items()]
    rows.sort(key=lambda row: len(row[2]))
    found: dict[Any, Reading] = {}
    start = 0
    while start < len(rows):
        stop = start + 1
        # Sorted by length: the last row of a part is its longest.
        while stop < len(rows) and (stop + 1 - start) * len(rows[stop][2]) <= _TOKENS_A_BATCH:
            stop += 1
        part, start = rows[start:stop], stop
        numbers = torch.tensor([number for number, _, _ in part], device=device)
        # The prompt's last state predicts the first token of a target, the state at each token the next one.
        first = prefill.last[numbers]
        longer = [line for line, (_, _, ids) in enumerate(part) if len(ids) > 1]
        places = [(line, 0, ids[0]) for line, (_, _, ids) in enumerate(part)]
        states = first
        if longer:
            behind = prefill.states_behind(numbers[longer], [part[line][2][:-1] for line in longer])
            inner = [(row, column) for row, line in enumerate(longer) for column in range(len(part[line][2]) - 1)]
            at = torch.tensor(inner, device=device)
            states = torch.cat([first, behind[at[:, 0], at[:, 1]]])
            places += [(longer[row], column + 1, part[longer[row]][2][column + 1]) for row, column in inner]
        chosen, losses = _score(prefill, states, torch.tensor([token for _, _, token in places], device=device))
        said: list[list[int]] = [[0] * len(ids) for _, _, ids in part]
        total = [0.0] * len(part)
        for (line, column, _), token, loss in zip(places, chosen, losses, strict=True):
            said[line][column] = token
            total[line] += loss
        for line, (_, pair, ids) in enumerate(part):
            found[pair] = Reading(ids, tuple(said[line]), total[line] / len(ids))
    return found


def _score(prefill: Ran, states: Tensor, labels: Tensor) -> tuple[list[int], list[float]]:
    """Return arg-max tokens and losses at the given states (n, H), a bounded number of logits at a time."""
    step = max(1, _LOGITS_A_CHUNK // prefill.lm.model.config.vocab_size)
    chosen: list[int] = []
    losses: list[float] = []
    for start in range(0, len(labels), step):
        logits = prefill.logits(states[start : start + step])
        chosen += logits.argmax(-1).tolist()
        losses += F.cross_entropy(logits, labels[start : start + step], reduction="none").tolist()
    return chosen, losses


def _texts(prefill: Ran, prompts: Sequence[Prompt], stops: _Stops) -> dict[Pair, str]:
    lm, device = prefill.lm, prefill.last.device
    rows = [(number, pair, room) for number, prompt in enumerate(prompts) for pair, room in prompt.write.items()]
    # Rows that may grow equally long end together.
    rows.sort(key=lambda row: row[2])
    found: dict[Pair, str] = {}
    for start in range(0, len(rows), _ROWS_A_GENERATION):
        part = rows[start : start + _ROWS_A_GENERATION]
        new = prefill.continuations(
            torch.tensor([number for number, _, _ in part], device=device),
            torch.tensor([room for _, _, room in part], device=device),
            torch.stack([stops.behind(target) for _, (_, target), _ in part]),
            [prompts[number].guesses[pair] for number, pair, _ in part],
        )
        for (_, pair, _), ids in zip(part, new, strict=True):
            found[pair] = str(lm.tokenizer.decode(ids, skip_special_tokens=True))
    return found


def require_room(lm: LanguageModel, prompt: str, target: str) -> None:
    """Raise :class:`TokenError` unless the model's context holds a prompt and all that may be generated behind it."""
    tokens = len(lm.encode(prompt).ids) + _room(lm, prompt, target)
    if tokens > lm.context_tokens:
        raise TokenError(
            what=f"prompt and answer may take {tokens} tokens and the model's context holds {lm.context_tokens}",
            where=f"{prompt[:60]!r}…",
            fix="shorten the prompt",
        )


def line_breaks(lm: LanguageModel) -> list[int]:
    """Return the ids of the tokens that hold a line break."""
    # Byte-level vocabularies write the line break as "Ċ", SentencePiece's byte fallback as <0x0A>.
    vocabulary = lm.tokenizer.get_vocab().items()
    return [index for token, index in vocabulary if "\n" in token or "Ċ" in token or token == "<0x0A>"]


def _room(lm: LanguageModel, prompt: str, target: str) -> int:
    if not target:
        return _MOST_NEW_TOKENS
    return min(_MOST_NEW_TOKENS, len(lm.encode(prompt, target).target_ids) + _SPARE_TOKENS)


class _Stops:
    """Masks over the vocabulary of the tokens that end a text: the end token, line breaks, and mostly full stops."""

    def __init__(self, lm: LanguageModel) -> None:
        vocabulary = lm.tokenizer.get_vocab().items()
        breaks = line_breaks(lm)
        stops = [index for token, index in vocabulary if token.endswith(".")]
        end = lm.tokenizer.eos_token_id
        width = max(int(lm.model.config.vocab_size), 1 + max(index for _, index in vocabulary))
        self._breaks = torch.zeros(width, dtype=torch.bool, device=lm.device)
        self._breaks[[*breaks, *([] if end is None else [end])]] = True
        self._all = self._breaks.clone()
        self._all[stops] = True

    def behind(self, target: str) -> Tensor:
        """Return the mask (vocabulary,) for a text that is compared with ``target``."""
        return self._breaks if "." in target else self._all
