"""What is to be read and written behind which prompts, put together so that every prompt runs once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from everedit.errors import TokenError
from everedit.models import LanguageModel
from everedit.models.encoded_prompts import EncodedPrompts
from everedit.models.mixture import MixedPrompts
from everedit.models.model import Speaker
from everedit.models.prefill import Prefill, prefilled

__all__ = ["Asked", "Ids", "Pair", "Prompt", "Ran", "batches", "ran"]

Pair = tuple[str, str]
Ids = tuple[int, ...]
Ran = Prefill | EncodedPrompts | MixedPrompts
"""Prompts behind the models that answer them."""


# A beginning that this many tokens share runs once for all of them, if it is at least this share of each.
_LEAST_SHARED, _LEAST_SHARE = 24, 0.5


@dataclass
class Prompt:
    """A prompt's ids, whose model it is, and what is to be read and to be written behind it, each under a name.

    ``shared`` ids at its beginning are those of other prompts too. A ``second`` model answers with it, from ids of its
    own, to a ``share``.
    """

    lm: LanguageModel
    ids: Ids
    shared: Ids = ()
    second: tuple[LanguageModel, Ids] | None = None
    share: float = 0.0
    read: dict[Hashable, Ids] = field(default_factory=dict)
    write: dict[Pair, int] = field(default_factory=dict)
    guesses: dict[Pair, list[Ids]] = field(default_factory=dict)

    def behind(self) -> int:
        """The most tokens that come behind this prompt."""
        return max([*map(len, self.read.values()), *self.write.values()])

    def length(self) -> int:
        """The tokens of this prompt, or of the second model's if it is longer."""
        return max(len(self.ids), len(self.second[1]) if self.second else 0)


class Asked:
    """Prompts by what answers them; ``room(lm, prompt, target)`` are the tokens that may be written."""

    def __init__(
        self, lm: LanguageModel, pairs: Sequence[Pair], room: Callable[[LanguageModel, str, str], int]
    ) -> None:
        self.lm, self._room = lm, room
        self._prompts: dict[tuple[object, ...], Prompt] = {}
        needed: dict[str, int] = {}
        if lm.redirect is not None:
            for prompt, target in pairs:
                tokens = max(room(lm, prompt, target), len(lm.encode(prompt, target).target_ids))
                needed[prompt] = max(needed.get(prompt, 0), tokens)
        prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
        speakers = lm.speakers(prompts, [needed.get(prompt, 0) for prompt in prompts])
        self._speakers = dict(zip(prompts, speakers, strict=True))

    def read(self, pair: Pair) -> None:
        """Ask for a reading of a pair's target."""
        speaker = self._speakers[pair[0]]
        text = speaker.lm.encode(speaker.prompt, pair[1])
        self._at(speaker, text.ids[: text.prompt_end], pair).read[pair] = text.target_ids

    def write(self, pair: Pair, guesses: Sequence[str]) -> None:
        """Ask for a free text that is compared with a pair's target; it might be one of the guesses."""
        speaker = self._speakers[pair[0]]
        encode = speaker.lm.encode
        prompt = self._at(speaker, encode(speaker.prompt).ids, pair)
        prompt.write[pair] = self._room(self.lm, *pair)
        prompt.guesses[pair] = [encode(speaker.prompt, text).ids[len(prompt.ids) :] for text in guesses if text]

    def _at(self, speaker: Speaker, ids: Ids, pair: Pair) -> Prompt:
        if not ids:
            raise TokenError(what="the prompt has no token of its own", where=repr(pair[0]), fix="give a longer prompt")
        lm, second = speaker.lm, None
        if speaker.second is not None:
            text = speaker.second.lm.encode(speaker.second.prompt, pair[1])
            second = speaker.second.lm, text.ids[: text.prompt_end]
        if (lm, ids, second) not in self._prompts:
            shared = lm.encode(speaker.shared).ids if speaker.shared else ()
            # A token may straddle the border, and then there is nothing to share.
            begun = shared if ids[: len(shared)] == shared else ()
            self._prompts[lm, ids, second] = Prompt(lm, ids, begun, second, speaker.share)
        return self._prompts[lm, ids, second]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each once."""
        return list(self._prompts.values())


def batches(prompts: Sequence[Prompt], most: int) -> Iterator[list[Prompt]]:
    """Yield prompts that one model answers, that begin alike or not at all alike, and of like length.

    So a long beginning runs once for all that have it, and little of ``most`` tokens is padding.
    """
    groups: dict[tuple[object, ...], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.lm, prompt.shared, prompt.second and prompt.second[0]].append(prompt)
    for group in groups.values():
        for alike in _beginning_alike(group) if not group[0].shared and group[0].second is None else [group]:
            yield from _of_like_length(alike, most)


def _beginning_alike(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Yield groups that share a long beginning, which is put down in each of them, and the rest as one more."""
    ranked = sorted(prompts, key=lambda prompt: prompt.ids)
    rest: list[Prompt] = []
    start = 0
    while start < len(ranked):
        # In order of their ids, prompts that begin alike stand together.
        first = ranked[start].ids
        stop, shared, longest = start + 1, len(first) - 1, len(first)
        while stop < len(ranked):
            ids = ranked[stop].ids
            common, longest = min(shared, _common(first, ids), len(ids) - 1), max(longest, len(ids))
            if common < max(_LEAST_SHARED, _LEAST_SHARE * longest):
                break
            stop, shared = stop + 1, common
        group, start = ranked[start:stop], stop
        if len(group) == 1:
            rest += group
            continue
        for prompt in group:
            prompt.shared = prompt.ids[:shared]
        yield group
    if rest:
        yield rest


def _common(one: Ids, other: Ids) -> int:
    """Return how many ids two rows share at their beginning."""
    for place, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return place
    return min(len(one), len(other))


def _of_like_length(group: Sequence[Prompt], most: int) -> Iterator[list[Prompt]]:
    batch: list[Prompt] = []
    for prompt in sorted(group, key=Prompt.length):
        # Padding puts every row's end behind the longest prompt, which is the last one.
        longest = prompt.length() + max(item.behind() for item in (*batch, prompt))
        if batch and ((len(batch) + 1) * longest > most or longest > prompt.lm.context_tokens):
            yield batch
            batch = []
        batch.append(prompt)
    yield batch


def ran(batch: Sequence[Prompt]) -> Ran:
    """Run the prompts of a batch."""
    lm = batch[0].lm
    first = prefilled(lm, [prompt.ids for prompt in batch], len(batch[0].shared))
    seconds = [prompt.second for prompt in batch if prompt.second is not None]
    if not seconds:
        return first
    second = prefilled(seconds[0][0], [ids for _, ids in seconds])
    return MixedPrompts(first, second, torch.tensor([prompt.share for prompt in batch], device=lm.device))
