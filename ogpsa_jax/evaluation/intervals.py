"""Confidence intervals: Wilson's for rates, the bootstrap's for means."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


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
    z = _quantile(confidence)
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # Exact at the ends, where round-off would leave 1e-17 of it.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def wilson_error(successes: int, trials: int) -> float:
    """The standard error that Wilson's interval comes to: its half-width over the normal quantile.

    ``sqrt(p (1 - p) / n)`` would claim certainty where no trial succeeds, or every one.
    """
    low, high = wilson_interval(successes, trials)
    return (high - low) / (2 * _quantile(0.95))


def bootstrap_interval(
    sums: Sequence[float],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a weighted mean, by drawing items with replacement.

    Args:
      sums: one per item.
      weights: one per item; the mean is sum(sums) / sum(weights). By default 1 each.
      confidence: in (0, 1).
      resamples: how often the items are drawn anew.
      seed: of the draws.

    Returns:
      The lower and the upper end; both are the mean where there is one item.

    Raises:
      ValueError: no item, or not one weight for each.
    """
    means = bootstrap_means(sums, weights, resamples, seed)
    _quantile(confidence)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_means(
    sums: Sequence[float],
    weights: Sequence[float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> np.ndarray:
    """Weighted means of resampled items, float64 [resamples]; see :func:`bootstrap_interval`."""
    values = np.asarray(sums, np.float64)
    parts = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"sums must hold at least one item, got shape {values.shape}")
    if parts.shape != values.shape:
        raise ValueError(f"weights must have the shape {values.shape} of sums, got {parts.shape}")
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # a row at a time: all at once would not fit for many items
        chosen = draw.integers(values.size, size=values.size)
        means[i] = values[chosen].sum() / parts[chosen].sum()
    return means


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)
