"""Confidence intervals: Wilson's for rates, the bootstrap's for means."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

_AT_ONCE = 2**20  # drawn items held in memory at a time
_RESAMPLES = 2000  # draws of all items, unless told otherwise


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a rate (Wilson, 1927): sound near 0 and 1 and for few trials.

    Args:
      successes: how many of the trials succeeded.
      trials: at least 1.
      confidence: in (0, 1).

    Returns:
      The lower and the upper end.

    Raises:
      ValueError: an argument out of range.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, {trials}], got {successes}")
    _check(confidence)
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def wilson_error(successes: int, trials: int) -> float:
    """The standard error that Wilson's interval comes to: its half-width over the normal quantile.

    ``sqrt(p (1 - p) / n)`` would claim certainty where no trial succeeds, or every one.
    """
    low, high = wilson_interval(successes, trials)
    return (high - low) / (2 * float(stats.norm.ppf(0.975)))


def bootstrap_interval(
    sums: Sequence[float],
    weights: Sequence[float] | None = None,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a weighted mean, by drawing items with replacement.

    Args:
      sums: one per item.
      weights: one per item; the mean is sum(sums) / sum(weights). By default 1 each.
      resamples: how often the items are drawn.
      seed: of the draws.

    Returns:
      The lower and the upper end; both are the mean where there is one item.

    Raises:
      ValueError: no item, or not one weight for each.
    """
    values, parts = _items(sums, weights)
    if values.size == 1:
        mean = float(values[0] / parts[0])
        return mean, mean
    interval = _bootstrap(values, parts, resamples, seed).confidence_interval
    return float(interval.low), float(interval.high)


def bootstrap_means(sums: Sequence[float], weights: Sequence[float] | None = None) -> np.ndarray:
    """Weighted means of 2,000 resamples, float64 [2000]; see :func:`bootstrap_interval`."""
    values, parts = _items(sums, weights)
    if values.size == 1:
        return np.full(_RESAMPLES, values[0] / parts[0])
    return _bootstrap(values, parts, _RESAMPLES, 0).bootstrap_distribution


def _bootstrap(values: np.ndarray, parts: np.ndarray, resamples: int, seed: int) -> Any:
    return stats.bootstrap(
        (values, parts),
        lambda sums, weights, axis: sums.sum(axis=axis) / weights.sum(axis=axis),
        paired=True,
        confidence_level=0.95,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // values.size),
        method="percentile",
        rng=np.random.default_rng(seed),
    )


def _items(sums: Sequence[float], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums and weights as arrays, one of each per item."""
    values = np.asarray(sums, np.float64)
    parts = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"sums must contain at least one item, got shape {values.shape}")
    if parts.shape != values.shape:
        raise ValueError(f"weights must have the shape {values.shape} of sums, got {parts.shape}")
    return values, parts


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
