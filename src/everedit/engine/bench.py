"""What a method works with: the model, its statistics, the seed, and a clock for each phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

from torch import Tensor

from everedit.edit import Edit
from everedit.engine.moments import MomentStore
from everedit.models import LanguageModel
from everedit.models.layout import oriented

__all__ = ["Clock", "Workbench"]

Made = TypeVar("Made")


class Clock:
    """Seconds spent in named phases; phases may nest, and the inner time is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to ``name``."""
        self._inner.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] += spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add time that was spent elsewhere."""
        for name, spent in seconds.items():
            self.seconds[name] += spent

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call, and start again at zero."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        return seconds


@dataclass
class Workbench:
    """A model and all that methods share while they work on it.

    ``pool(name, path)`` gives the edits of a data set that has nothing to do with the stream.
    """

    lm: LanguageModel
    moments: MomentStore
    seed: int = 0
    masters: Callable[[str], Tensor | None] = lambda name: None
    pool: Callable[[str, str | None], Sequence[Edit]] = lambda name, path: ()
    clock: Clock = field(default_factory=Clock)
    _made: dict[tuple[object, ...], object] = field(default_factory=dict)

    def weight(self, name: str) -> Tensor:
        """Return a weight (d_out, d_in) in float32 as the stream keeps it, which a narrow model shows rounded."""
        master = self.masters(name)
        return oriented(self.lm.layout.module_of(name)).float() if master is None else master

    def once(self, key: tuple[object, ...], make: Callable[[], Made]) -> Made:
        """Return what ``make`` gives, made at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])

    def contexts(self, groups: tuple[tuple[int, int], ...], starts: tuple[str, ...]) -> list[str]:
        """Return the prefixes of :func:`everedit.engine.contexts.sample_prefixes`, sampled once a bench.

        They come from the model as it is at the first call: sample before the first edit.
        """
        from everedit.engine.contexts import sample_prefixes

        def sampled() -> list[str]:
            with self.clock.phase("contexts"):
                return sample_prefixes(self.lm, groups, starts, self.seed)

        return self.once(("contexts", groups, starts), sampled)
