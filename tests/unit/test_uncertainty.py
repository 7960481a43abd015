"""Intervals and paired tests against scipy's, and against what can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from everedit.uncertainty import bootstrap_interval, holm, paired_test


def scores(n: int, seed: int, rate: float = 0.6) -> list[float]:
    return np.random.default_rng(seed).binomial(4, rate, size=n).astype(float).tolist()


@pytest.mark.parametrize("n", [12, 300])
def test_the_interval_of_one_sample_is_scipys(n: int) -> None:
    values = scores(n, 1)
    low, high = bootstrap_interval([values], draws=20_000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=0).confidence_interval
    spread = np.std(values) / n**0.5
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.1 * spread)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for trial in range(300):
        low, high = bootstrap_interval([scores(60, 1000 + trial, rate=0.5)], draws=500, seed=trial)
        inside += low <= 2.0 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_several_seeds_that_disagree_widen_the_interval() -> None:
    together = bootstrap_interval([[0.2, 0.4] * 50, [0.2, 0.4] * 50])
    apart = bootstrap_interval([[0.0, 0.2] * 50, [0.4, 0.6] * 50])
    assert apart[1] - apart[0] > 5 * (together[1] - together[0])
    # Two seeds: one time in four both draws are the lower one.
    assert apart[0] == pytest.approx(0.1, abs=0.03)
    assert apart[1] == pytest.approx(0.5, abs=0.03)


def test_an_interval_is_the_same_every_time_and_none_of_nothing() -> None:
    assert bootstrap_interval([scores(40, 2)]) == bootstrap_interval([scores(40, 2)])
    assert bootstrap_interval([[0.5]]) == (0.5, 0.5)
    for nothing in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="sample"):
            bootstrap_interval(nothing)


def permutation(first: list[float], second: list[float], resamples: float) -> float:
    def gap(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(b - a, axis=axis)

    found = stats.permutation_test(
        (first, second), gap, permutation_type="samples", n_resamples=resamples, vectorized=True, rng=0
    )
    return float(found.pvalue)


@pytest.mark.parametrize("seed", range(6))
def test_the_test_of_few_pairs_is_scipys_exact_one(seed: int) -> None:
    first, second = scores(10, seed), scores(10, 100 + seed, rate=0.8)
    found = paired_test(first, second)
    assert found.exact
    assert found.p == pytest.approx(permutation(first, second, np.inf))


def test_the_test_of_many_pairs_is_near_scipys() -> None:
    first, second = scores(80, 3), scores(80, 7, rate=0.68)
    found = paired_test(first, second)
    assert not found.exact
    theirs = permutation(first, second, 20_000)
    assert 0.02 < theirs < 0.1
    assert found.p == pytest.approx(theirs, abs=0.012)


def test_a_paired_test_by_hand() -> None:
    found = paired_test([0.0, 0.0, 0.0, 1.0, 0.5], [1.0, 1.0, 1.0, 0.0, 0.5])
    assert (found.first, found.second, found.difference) == pytest.approx((0.3, 0.7, 0.4))
    assert (found.better, found.worse, found.same, found.pairs) == (3, 1, 1, 5)
    # Of the 16 ways to sign four differences of 1, ten have a sum of at least 2 either way.
    assert found.p == 10 / 16
    assert found.low <= found.difference <= found.high


def test_what_does_not_differ_is_never_found_to() -> None:
    found = paired_test([0.5] * 30, [0.5] * 30)
    assert (found.difference, found.low, found.high, found.p, found.same) == (0.0, 0.0, 0.0, 1.0, 30)
    with pytest.raises(ValueError, match="length"):
        paired_test([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="length"):
        paired_test([], [])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
