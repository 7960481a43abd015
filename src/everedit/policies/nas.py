"""NAS: v* <- a v* / ||v*||, with one norm a for all edits, measured on the unedited model.

Liu et al., "Norm Anchors Make Model Edits Last", arXiv 2602.02543. A solved value may be a multiple of the present
activations, which earlier edits have made larger: norms feed on themselves until the model breaks. The anchor is the
mean norm of values solved for a thousand facts behind bare prompts, the largest 5 % left out. As in the released code
a value longer than twice the anchor is not written at all; such edits are counted.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field

from everedit.cache import cache_root, digest, write_json
from everedit.engine.state import State
from everedit.engine.target import Target
from everedit.errors import CacheError, EditError
from everedit.policies._base import Policy, PolicyConfig, Preparation


class NasConfig(PolicyConfig):
    """Settings of NAS."""

    anchor: float | None = Field(None, gt=0, description="a; None: measured on the unedited model")
    samples: int = Field(1000, ge=1, description="how many facts it is measured on, as far as the pool goes")
    quantile: float = Field(0.95, gt=0, le=1, description="share of them that counts, the shortest first")
    seed: int = Field(0, description="of the draw from the pool")
    pool: str = Field("worldfacts", description="the data set that the facts are drawn from")
    pool_path: str | None = Field(None, description="its file, where it does not ship with Everedit")
    skip_beyond: float = Field(2.0, gt=0, description="values longer than so many anchors are not written")
    enlarge: bool = Field(True, description="also lengthen shorter values, as in the paper; False: only shorten")


class Nas(Policy):
    """Keeps every written value at one length."""

    name = "nas"
    title = "NAS, norm-anchored values"
    paper = "arXiv 2602.02543"
    stage = "values"
    needs = "values"
    Config = NasConfig
    config: NasConfig

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__(config)
        self.anchor = self.config.anchor

    def prepare(self, preparation: Preparation) -> None:
        """Measure the anchor, or read it from the cache, where it lies under all that it depends on."""
        if self.anchor is not None:
            return
        config = self.config
        pool = list(preparation.pool(config.pool, config.pool_path))
        if not pool:
            raise EditError(
                what="the pool holds no fact that the method can edit, so there is no anchor to measure",
                where=config.pool_path or config.pool,
                fix="choose another pool, or give the anchor itself (policy.anchor)",
            )
        drawn = random.Random(config.seed).sample(pool, min(config.samples, len(pool)))
        chosen = config.model_dump(mode="json", include={"samples", "quantile", "seed", "pool"})
        key = {**preparation.provenance, "nas": chosen, "drawn": digest([edit.id for edit in drawn])}
        file = cache_root() / "anchors" / f"{digest(key)}.json"
        if file.exists():
            try:
                self.anchor = _sound(json.loads(file.read_text(encoding="utf-8"))["anchor"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise CacheError(
                    what="this cached anchor is damaged", where=str(file), fix=f"delete the file: rm '{file}'"
                ) from error
            return
        norms = [float(target.written.norm()) for target in preparation.solve(drawn)]
        self.anchor = trimmed_mean(norms, config.quantile)
        write_json(file, {"anchor": self.anchor, "facts": len(norms), **key})

    def adjust(self, targets: Sequence[Target], state: State) -> tuple[list[Target], State]:
        """Return the targets with their values at the anchor's length; those too long are taken back entirely."""
        assert self.anchor is not None
        skipped = int(state.values.get("skipped", 0))
        adjusted = []
        for target in targets:
            length = float(target.written.norm())
            if length > self.config.skip_beyond * self.anchor:
                adjusted.append(replace(target, delta=torch.zeros_like(target.delta)))
                skipped += 1
            elif length == 0 or (length < self.anchor and not self.config.enlarge):
                adjusted.append(target)
            else:
                scaled = target.written * (self.anchor / length)
                adjusted.append(replace(target, delta=target.delta + (scaled - target.written)))
        return adjusted, State(state.tensors, {**state.values, "skipped": skipped})


def _sound(value: object) -> float:
    """Return an anchor that was read. Raises ``ValueError`` unless it is a positive number."""
    if not isinstance(value, float) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no length")
    return value


def trimmed_mean(values: Sequence[float], quantile: float) -> float:
    """Return the mean of the smallest ``quantile`` of values."""
    kept = sorted(values)[: max(1, int(quantile * len(values) + 1e-9))]
    return sum(kept) / len(kept)


POLICY = Nas
