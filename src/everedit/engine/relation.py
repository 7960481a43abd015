"""Whether two prompts about one subject ask for the same thing: a linear map of sentence embeddings, and a limit.

A sentence encoder puts texts together that share their topic; "{} was born in" and "{} died in" are neighbours there.
The map W (d, p) is learned from ways to ask for the same relation by the contrastive loss of InfoNCE (van den Oord et
al., 2018, equation 4, over cosines); subjects are masked in all texts. The limit is the cosine that pairs of
different relations rarely reach. One limit for all does not tell neighbours such as mother and father apart: texts
that both lie close to known ones, of relations known to be different, are apart whatever their cosine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from everedit.cache import cache_root, digest
from everedit.models.sentences import SentenceEncoder
from everedit.patch import load_tensors, save_tensors

__all__ = ["MASK", "SHIPPED", "RelationMetric", "built_in_relations", "built_in_wordings"]

MASK = "it"
"""What stands for the subject."""

SHIPPED = Path(__file__).with_name("relations.safetensors")
"""What was learned from the built-in relations alone with the packaged encoder (``tools/learn_relations.py``)."""

_WIDTH, _STEPS, _BATCH, _RATE = 128, 600, 512, 3e-3
_SHARPNESS = 20.0
# A data set has thousands of groups in a few wordings: without a share of their own the others would hardly be drawn.
_DISTINCT_SHARE = 0.2
# Unlike texts that an encoder sets this close may well ask for the same thing, though nobody says so.
_PERHAPS_THE_SAME = 0.85
# Behind the map: how close to a known way to ask a text certainly asks for that, and by how much closer than to one
# and the same relation two texts lie to two.
_CERTAIN, _CLEARLY = 0.8, 0.05
_AT_ONCE = 256


def built_in_relations() -> tuple[tuple[str, ...], ...]:
    """Return the relations that ship with Everedit: the ways to ask for each, with the subject masked."""
    return tuple(tuple(text.replace("{}", MASK) for text in texts) for texts in _templates())


def built_in_wordings() -> list[str]:
    """Return the same texts one after another, with {} in the subject's place."""
    return [text for texts in _templates() for text in texts]


@cache
def _templates() -> tuple[tuple[str, ...], ...]:
    lines = Path(__file__).with_name("relations.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(tuple(json.loads(line)["templates"]) for line in lines)


@dataclass(frozen=True)
class RelationMetric:
    """The map ``weight`` (d, p) and the least cosine behind it, ``limit``, of texts that ask for the same thing.

    ``keys`` (n, p) are the texts that it was learned from, mapped, and ``owners`` (n,) the number of each one's group;
    those of the first ``distinct`` groups are known to ask for different things.
    """

    weight: Tensor
    limit: float
    keys: Tensor
    owners: Tensor
    distinct: int

    def project(self, embeddings: Tensor) -> Tensor:
        """Return embeddings (n, d) mapped to unit vectors (n, p), a product of two of which is their likeness."""
        return F.normalize(embeddings @ self.weight.to(embeddings), dim=-1)

    def apart(self, one: Tensor, others: Tensor) -> Tensor:
        """Return whether a text (p,), mapped, is known to ask for something else than each of ``others`` (n, p): (n,).

        Both must lie close to relations known to be different, and no group of texts may hold both nearly as well.
        """
        first, mine = int((self.owners < self.distinct).sum()), self.keys @ one.cpu()
        surest = mine[:first].amax()
        if surest < _CERTAIN:
            return torch.zeros(len(others), dtype=torch.bool)
        groups = torch.full((int(self.owners[-1]) + 1,), -1.0).scatter_reduce(0, self.owners, mine, "amax")
        # A group farther from the one text than this could not hold both well enough.
        near = (groups >= _CERTAIN - _CLEARLY)[self.owners].nonzero()[:, 0]
        near_keys, near_mine = self.keys[near], groups[self.owners[near]]
        found = [torch.zeros(0, dtype=torch.bool)]
        for part in others.cpu().split(_AT_ONCE):
            together = torch.minimum(near_mine, part @ near_keys.T).amax(1)
            certain = (part @ self.keys[:first].T).amax(1).clamp_max(surest)
            found.append((certain >= _CERTAIN) & (certain >= together + _CLEARLY))
        return torch.cat(found)

    @classmethod
    def known(cls, more: Sequence[Sequence[str]], encoder: SentenceEncoder, allowed: float) -> RelationMetric:
        """Return what the built-in relations and ``more`` groups of texts teach; it is learned once and kept."""
        own = built_in_relations()
        provenance = cls.provenance(own, more, encoder=encoder.name, allowed=allowed)
        kept = cache_root() / "routers" / f"{digest(provenance)}.safetensors"
        for file in (SHIPPED, kept):
            if file.exists() and (metric := cls.kept(file, provenance)):
                return metric
        metric = cls.of_texts(own, more, encoder.embed, allowed=allowed)
        metric.keep(kept, provenance)
        return metric

    @classmethod
    def of_texts(
        cls,
        distinct: Sequence[Sequence[str]],
        more: Sequence[Sequence[str]],
        embed: Callable[[Sequence[str]], Tensor],
        *,
        allowed: float,
    ) -> RelationMetric:
        """Learn from groups of texts, each of which asks for one thing; those of ``distinct`` for different things.

        A share ``allowed`` of the pairs across the distinct groups may reach the limit.
        """
        groups = [*distinct, *more]
        owners = [number for number, group in enumerate(groups) for _ in group]
        embeddings = embed([text for group in groups for text in group]).cpu()
        return cls.learned(embeddings, owners, distinct=len(distinct), allowed=allowed)

    @staticmethod
    def provenance(
        distinct: Sequence[Sequence[str]], more: Sequence[Sequence[str]], *, encoder: str, allowed: float
    ) -> dict[str, Any]:
        """Return what tells the metric learned of these texts from any other, the way of learning included."""
        learning = [_WIDTH, _STEPS, _BATCH, _RATE, _SHARPNESS, _DISTINCT_SHARE, _PERHAPS_THE_SAME]
        return {
            "texts": digest([distinct, more]),
            "encoder": encoder,
            "allowed": allowed,
            "learning": digest(learning),
        }

    @classmethod
    def kept(cls, file: Path, provenance: Mapping[str, Any]) -> RelationMetric | None:
        """Return what was learned and kept in a file; None if it was learned from anything else."""
        tensors, info = load_tensors(file)
        if "owners" not in tensors or any(info.get(name) != value for name, value in provenance.items()):
            return None
        weight, keys = tensors["weight"].float(), tensors["keys"].float()
        return cls(weight, float(info["limit"]), keys, tensors["owners"].long(), int(info["distinct"]))

    def keep(self, file: Path, provenance: Mapping[str, Any]) -> None:
        """Write what was learned, and from what."""
        tensors = {"weight": self.weight.half(), "keys": self.keys.half(), "owners": self.owners.int()}
        save_tensors(file, tensors, {"limit": self.limit, "distinct": self.distinct, **provenance})

    @classmethod
    def learned(
        cls, embeddings: Tensor, groups: Sequence[int], *, distinct: int, allowed: float, seed: int = 0
    ) -> RelationMetric:
        """Learn from embedded texts (n, d), of which those with the same group number ask for the same thing.

        Groups are numbered in the order of their texts. The first ``distinct`` are known to ask for different things:
        a share ``allowed`` of the pairs across them may reach the limit.
        """
        owners = torch.tensor(groups)
        first = int((owners < distinct).sum())
        random = torch.Generator().manual_seed(seed)
        weight = torch.empty(embeddings.shape[1], min(_WIDTH, embeddings.shape[1]))
        torch.nn.init.orthogonal_(weight, generator=random)
        weight.requires_grad_()
        optimiser = torch.optim.Adam([weight], lr=_RATE)
        pairs = _Batches(owners, first)
        with torch.enable_grad():
            for _ in range(_STEPS):
                left, right = pairs.drawn(_BATCH, random)
                loss = _contrast(embeddings, owners, first, weight, left, right)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        # As it is kept.
        rounded = weight.detach().half().float()
        keys = F.normalize(embeddings @ rounded, dim=-1)
        limit = _limit(keys[:first], owners[:first], allowed, random)
        return cls(rounded, limit, keys.half().float(), owners, distinct)


class _Batches:
    """Draws pairs of texts of one group: a share of the groups known to be distinct, the rest of the others."""

    def __init__(self, owners: Tensor, distinct: int) -> None:
        self._parts = [_Pairs(owners[:distinct], 0)]
        if distinct < len(owners):
            self._parts.append(_Pairs(owners[distinct:], distinct))

    def drawn(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the numbers of the pairs' texts, (count,) each."""
        parts = [part for part in self._parts if part]
        first = round(_DISTINCT_SHARE * count) if len(parts) == 2 else count
        drawn = [part.drawn(size, random) for part, size in zip(parts, (first, count - first), strict=False)]
        left, right = zip(*drawn, strict=True)
        return torch.cat(left), torch.cat(right)


class _Pairs:
    """Draws two texts of one group, every group as often as any other; numbers begin at ``start``."""

    def __init__(self, owners: Tensor, start: int) -> None:
        order = owners.argsort(stable=True)
        counts = torch.unique_consecutive(owners[order], return_counts=True)[1]
        starts = counts.cumsum(0) - counts
        several = counts > 1
        self._order, self._starts, self._counts = order + start, starts[several], counts[several]

    def __bool__(self) -> bool:
        return len(self._counts) > 0

    def drawn(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the numbers of the pairs' texts, (count,) each."""
        group = torch.randint(len(self._counts), (count,), generator=random)
        size = self._counts[group]
        first = (torch.rand(count, generator=random) * size).long()
        step = 1 + (torch.rand(count, generator=random) * (size - 1)).long()
        second = (first + step) % size
        return self._order[self._starts[group] + first], self._order[self._starts[group] + second]


def _contrast(embeddings: Tensor, owners: Tensor, distinct: int, weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the loss of finding each left text's partner among all right ones, and the other way round."""
    a, b = embeddings[left], embeddings[right]
    likeness = _SHARPNESS * F.normalize(a @ weight, dim=1) @ F.normalize(b @ weight, dim=1).T
    known = (left < distinct)[:, None] & (right < distinct)
    close = ((a @ a.T > _PERHAPS_THE_SAME) | (b @ b.T > _PERHAPS_THE_SAME)) & ~known
    perhaps = (owners[left][:, None] == owners[right]) | close
    likeness = likeness.masked_fill(perhaps & ~torch.eye(len(a), dtype=torch.bool), float("-inf"))
    own = torch.arange(len(a))
    return F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)


def _limit(projected: Tensor, owners: Tensor, allowed: float, random: torch.Generator) -> float:
    left, right = torch.randint(len(owners), (2, 100_000), generator=random)
    apart = owners[left] != owners[right]
    return float((projected[left] * projected[right]).sum(1)[apart].quantile(1 - allowed))
