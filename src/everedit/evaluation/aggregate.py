"""How the scores of many edits become one figure, and how sure that figure is: means, medians, bootstrap intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from everedit.uncertainty import percentile_interval, resamples

__all__ = ["Aggregate", "harmonic_of", "intervals", "mean_of", "mean_of_means", "median_of", "summarised"]

Values = Mapping[str, np.ndarray]
Aggregate = Callable[[Values], np.ndarray]
"""From each metric's values (samples, edits), NaN where an edit has none, to a figure for each sample (samples,)."""


def mean_of(metric: str) -> Aggregate:
    """Return the mean of a metric over the edits that have it."""
    return lambda values: np.nanmean(values[metric], axis=1)


def median_of(metric: str) -> Aggregate:
    """Return the median of a metric over the edits that have it; of an even number, midway between the two."""
    return lambda values: np.nanmedian(values[metric], axis=1)


def mean_of_means(*metrics: str) -> Aggregate:
    """Return the mean of several metrics' means; none where one of them is missing."""
    return lambda values: np.mean([np.nanmean(values[metric], axis=1) for metric in metrics], axis=0)


def harmonic_of(*metrics: str) -> Aggregate:
    """Return the harmonic mean of several metrics' means, n / (1/m_1 + … + 1/m_n); 0 where one of them is 0."""

    def harmonic(values: Values) -> np.ndarray:
        with np.errstate(divide="ignore"):
            inverse = [1 / np.nanmean(values[metric], axis=1) for metric in metrics]
        return np.asarray(len(metrics) / np.sum(inverse, axis=0))

    return harmonic


def summarised(
    scores: Sequence[Mapping[str, float | None]], metrics: Sequence[str], aggregates: Mapping[str, Aggregate]
) -> dict[str, float | None]:
    """Return every aggregate of the edits' scores; None where no edit has what it is made of."""
    values = {name: column[None] for name, column in _columns(scores, metrics).items()}
    found = {name: float(_quietly(aggregate, values)[0]) for name, aggregate in aggregates.items()}
    return {name: None if np.isnan(figure) else figure for name, figure in found.items()}


def intervals(
    scores: Sequence[Mapping[str, float | None]],
    metrics: Sequence[str],
    aggregates: Mapping[str, Aggregate],
    *,
    draws: int = 1_000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """Return a 95 % bootstrap interval of every aggregate; None where no edit has what it is made of.

    Edits are drawn anew with replacement, each with all of its scores, since the scores of one edit go together.
    """
    columns = _columns(scores, metrics)
    found: dict[str, list[np.ndarray]] = {name: [] for name in aggregates}
    for drawn in resamples(len(scores), draws, seed):
        values = {name: column[drawn] for name, column in columns.items()}
        for name, aggregate in aggregates.items():
            found[name].append(_quietly(aggregate, values))
    figures = {name: np.concatenate(parts) for name, parts in found.items() if parts}
    known = {name: figure[~np.isnan(figure)] for name, figure in figures.items()}
    return {name: percentile_interval(known[name]) if len(known.get(name, ())) else None for name in aggregates}


def _columns(scores: Sequence[Mapping[str, float | None]], metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Return each metric's values (edits,), NaN where there is none."""
    table = {name: [item.get(name) for item in scores] for name in metrics}
    return {name: np.array([np.nan if v is None else v for v in values], float) for name, values in table.items()}


def _quietly(aggregate: Aggregate, values: Values) -> np.ndarray:
    """Return an aggregate where the mean of nothing is NaN and no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Mean of empty|All-NaN) slice", RuntimeWarning)
        return aggregate(values)
