"""Rows of a value optimisation, grouped and run once: what is constant is computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from everedit.engine.lane import Lane, Onward, Reads, TwoPlaces
from everedit.models import LanguageModel
from everedit.models.hooks import capture
from everedit.models.tokens import Encoded

__all__ = ["build_lanes", "passes"]

# Matrix products with fewer rows than this wait for the weights rather than for the arithmetic.
_ENOUGH_TOKENS = 48
_ENOUGH_TOKENS_ON_ACCELERATOR = 4096
# What runs forward and backward at once, and so keeps its activations, is not much larger than it must be.
_MOST_TOKENS = 256
_MOST_TOKENS_ON_ACCELERATOR = 16_384


@dataclass(frozen=True)
class _Row:
    """The ids to run, the text they come from, its edit, and whether it is the bare prompt or an essence row."""

    ids: tuple[int, ...]
    text: Encoded
    edit: int
    bare: bool
    essence: bool = False

    def tail(self) -> int:
        """How many tokens are run at each step: those from the subject's last on."""
        return len(self.ids) - self.text.subject_last


def build_lanes(
    lm: LanguageModel, rows: Sequence[Sequence[Encoded]], essence: Sequence[Encoded], layer: int, site: str
) -> list[Lane]:
    """Run all rows once and return the lanes: the rows that score a target, and those that keep the essence.

    ``rows[i]`` are edit i's rows, the one with the empty prefix first; ``essence[i]`` is its "{subject} is a".
    """
    scored = [_Row(row.ids[:-1], row, edit, index == 0) for edit, g in enumerate(rows) for index, row in enumerate(g)]
    kept = [_Row(row.ids[: row.subject_last + 1], row, edit, False, True) for edit, row in enumerate(essence)]
    groups = _by_tail(scored + kept, *_token_limits(lm))
    return [_lane(lm, group, len(rows[0]), layer, site) for group in groups]


def passes(lm: LanguageModel, lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Return the lanes in groups that run forward and backward together."""
    most = _token_limits(lm)[1]
    groups: list[list[Lane]] = []
    held = 0
    for lane in lanes:
        tokens = lane.hidden.shape[0] * lane.hidden.shape[1]
        if not groups or held + tokens > most:
            groups.append([])
            held = 0
        groups[-1].append(lane)
        held += tokens
    return groups


def _token_limits(lm: LanguageModel) -> tuple[int, int]:
    if lm.on_accelerator:
        return _ENOUGH_TOKENS_ON_ACCELERATOR, _MOST_TOKENS_ON_ACCELERATOR
    return _ENOUGH_TOKENS, _MOST_TOKENS


def _by_tail(rows: list[_Row], enough_tokens: int, most_tokens: int) -> list[list[_Row]]:
    """Split rows, in order of their tails' lengths, where a longer tail would make much padding.

    A group keeps growing while it is too small to keep the processor busy, or while padding stays under a tenth.
    """
    groups: list[list[_Row]] = []
    real = 0
    for row in sorted(rows, key=_Row.tail):
        padded = (len(groups[-1]) + 1) * row.tail() if groups else 0
        wasteful = real >= enough_tokens and padded > 1.1 * (real + row.tail())
        if not groups or wasteful or padded > most_tokens:
            groups.append([])
            real = 0
        groups[-1].append(row)
        real += row.tail()
    return groups


def _reads(rows: Sequence[_Row], device: torch.device) -> Reads:
    places = [
        (index, position - 1 - row.text.subject_last, row.text.ids[position], 1.0 / len(row.text.target_ids))
        for index, row in enumerate(rows)
        if not row.essence
        for position in range(*row.text.target)
    ]
    columns = list(zip(*places, strict=True)) or [()] * 4
    at_row, at_column, label = (torch.tensor(numbers, dtype=torch.long, device=device) for numbers in columns[:3])
    return Reads(at_row, at_column, label, torch.tensor(columns[3], dtype=torch.float32, device=device))


def _lane(lm: LanguageModel, rows: Sequence[_Row], prefixes: int, layer: int, site: str) -> Lane:
    layout, two = lm.layout, site == "attention+mlp"
    anchors = [row.text.subject_last for row in rows]
    batch, start = lm.pad([row.ids for row in rows], anchors=anchors), max(anchors)
    outputs = {"block": layout.block(layer), "mlp": layout.mlp_out(layer)}
    norm = layout.mlp_norm(layer)
    if norm is not None:
        outputs["norm"] = norm
    cache = DynamicCache()
    if two:
        outputs["attention"] = layout.attention_out(layer)
    with torch.no_grad(), capture({"entering": layout.block(layer)}, outputs, rows=len(rows)) as seen:
        lm.states(**batch.inputs(), past_key_values=cache, use_cache=True)
    resumed = layer - 1 if two else layer
    kept = [cache.layers[0], *cache.layers[resumed + 1 :]]
    past = [(part.keys[:, :, :start].clone(), part.values[:, :, :start].clone()) for part in kept]
    hidden = seen["entering" if two else "block"][:, start:]
    mlp = seen["mlp"][:, start].float()
    added = mlp if norm is None else seen["norm"][:, start].float()
    split = site == "mlp" and norm is not None
    origins = [mlp] if site == "mlp" else [hidden[:, 0].float()]
    if two:
        origins = [seen["attention"][:, start].float(), mlp]
    kind = {"attention+mlp": TwoPlaces, "onward": Onward}.get(site, Lane)
    return kind(
        layer=resumed,
        hidden=hidden.clone(),
        past=past,
        mask=batch.mask,
        positions=batch.positions[:, start:],
        owner=torch.tensor([row.edit for row in rows], device=lm.device),
        bare=torch.tensor([row.bare for row in rows], device=lm.device),
        essence=torch.tensor([row.essence for row in rows], device=lm.device),
        prefixes=prefixes,
        origin=torch.stack(origins, dim=1),
        added=added if site == "block" else mlp,
        reads=_reads(rows, lm.device),
        mlp=mlp if split else None,
        rest=hidden[:, 0].float() - added if split else None,
    )
