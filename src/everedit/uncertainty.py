"""How sure a mean is: bootstrap intervals, and paired tests of two runs over the same edits.

Only numbers go in and come out. Everything is drawn from a generator of its own, so that the same numbers always give
the same interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["PairedTest", "bootstrap_interval", "holm", "paired_test", "percentile_interval", "resamples"]

LEVEL = 0.95
_DRAWS = 2_000
_FLIPS = 20_000
_FLIPS_AT_ONCE = 1_000
# Up to so many pairs that differ, all sign changes are gone through.
_EXACT_PAIRS = 14
_ROUNDING = 1e-12
_INDICES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class PairedTest:
    """Two means over the same ``pairs``, and whether they differ by more than chance.

    ``difference`` is the second mean minus the first, with the bootstrap interval ``low`` to ``high``; ``p`` belongs to
    the two-sided test that flips the signs of the differences, all ways if ``exact``; ``better``, ``worse`` and
    ``same`` count pairs whose second value is higher, lower and equal.
    """

    pairs: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float
    exact: bool
    better: int
    worse: int
    same: int


def bootstrap_interval(
    samples: Sequence[Sequence[float]], *, level: float = LEVEL, draws: int = _DRAWS, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mean of each sample's mean.

    One sample is drawn from with replacement. Of several, for instance one for each seed, samples are drawn first, and
    then the values in each, so that the interval knows both ways to be unlucky.

    Raises :class:`ValueError` if a sample is empty or there is none.
    """
    if not samples or not all(len(sample) for sample in samples):
        raise ValueError("there must be at least one sample, and none may be empty")
    random = np.random.default_rng(seed)
    means = np.stack([_resampled_means(np.asarray(sample, dtype=float), draws, random) for sample in samples])
    if len(samples) > 1:
        chosen = random.integers(len(samples), size=(len(samples), draws))
        means = np.take_along_axis(means, chosen, axis=0)
    return percentile_interval(means.mean(axis=0), level)


def percentile_interval(figures: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Return the middle ``level`` of the figures (draws,) that resamples gave."""
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resamples(n: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Yield which of ``n`` values are drawn, with replacement, in parts of (some draws, n); nothing of nothing.

    For figures that are no mean of values: those need not know which, only how often.
    """
    random = np.random.default_rng(seed)
    at_once = max(1, _INDICES_AT_ONCE // max(1, n))
    for start in range(0, draws if n else 0, at_once):
        yield random.integers(n, size=(min(at_once, draws - start), n))


def _resampled_means(values: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """Return the means (draws,) of resamples of ``values`` (n,)."""
    # How often each value is drawn, rather than which: one product instead of n times draws look-ups.
    counts = random.multinomial(len(values), np.full(len(values), 1 / len(values)), size=draws)
    means: np.ndarray = counts @ values / len(values)
    return means


def paired_test(first: Sequence[float], second: Sequence[float], *, level: float = LEVEL, seed: int = 0) -> PairedTest:
    """Return the paired test of two runs' scores of the same edits, in the same order.

    Raises :class:`ValueError` if the two are not of one and the same length above 0.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError("the two must have one and the same length above 0")
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    differences = b - a
    low, high = bootstrap_interval([differences.tolist()], level=level, seed=seed)
    p, exact = _sign_flip(differences, seed)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedTest(
        pairs=len(a),
        first=float(a.mean()),
        second=float(b.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p=p,
        exact=exact,
        better=better,
        worse=worse,
        same=len(a) - better - worse,
    )


def _sign_flip(differences: np.ndarray, seed: int) -> tuple[float, bool]:
    """Return the two-sided p of the differences (n,) under random signs, and whether all signs were gone through."""
    nonzero = differences[differences != 0]
    observed = abs(nonzero.sum()) - _ROUNDING * np.abs(nonzero).sum()
    if len(nonzero) <= _EXACT_PAIRS:
        ways = np.arange(2 ** len(nonzero))[:, None]
        signs = 1 - 2 * (ways >> np.arange(len(nonzero)) & 1)
        return float((np.abs(signs @ nonzero) >= observed).mean()), True
    random = np.random.default_rng(seed)
    beyond = 0
    for _ in range(_FLIPS // _FLIPS_AT_ONCE):
        signs = random.choice((-1, 1), size=(_FLIPS_AT_ONCE, len(nonzero)))
        beyond += int((np.abs(signs @ nonzero) >= observed).sum())
    # The order observed is one of the ways, so that p is never 0 (Phipson and Smyth 2010).
    return (beyond + 1) / (_FLIPS + 1), False


def holm(values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p of each of several tests: what is below 0.05 holds for all of them together."""
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        highest = max(highest, min(1.0, values[index] * (len(values) - rank)))
        adjusted[index] = highest
    return adjusted
