import math

import numpy as np
import pytest

from ogpsa_jax.evaluation.intervals import bootstrap_interval, wilson_interval


def test_wilson_ends_solve_the_equation_that_defines_them(drawn):
    # An end p of the interval is where the observed rate is z standard errors of p away.
    z = 1.959963984540054
    for _ in range(50):
        trials = drawn.randrange(1, 500)
        successes = drawn.randrange(trials + 1)
        low, high = wilson_interval(successes, trials)
        rate = successes / trials
        assert 0 <= low <= rate <= high <= 1
        for end in (low, high):
            if end not in (0.0, 1.0):
                distance = abs(rate - end) / math.sqrt(end * (1 - end) / trials)
                assert distance == pytest.approx(z, rel=1e-6)


def test_wilson_is_symmetric_and_narrows_with_more_trials(drawn):
    trials = drawn.randrange(10, 100)
    successes = drawn.randrange(trials + 1)
    low, high = wilson_interval(successes, trials)
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low))
    wide = wilson_interval(successes * 100, trials * 100)
    assert wide[1] - wide[0] < high - low


def test_the_bootstrap_covers_the_mean_as_often_as_it_says(drawn):
    draw = np.random.default_rng(drawn.randrange(2**32))
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(draw.normal(3.0, 1.0, 40), seed=seed, resamples=400)
        hits += low <= 3.0 <= high
    # Expected 93 to 95 %; under 168 of 200 has a probability below 1e-7.
    assert hits >= 168


def test_the_bootstrap_weighs_items_as_the_mean_does(drawn):
    draw = np.random.default_rng(drawn.randrange(2**32))
    weights = draw.integers(1, 50, 30)
    # Sums in proportion to their weights: every resample has the same mean.
    low, high = bootstrap_interval(0.25 * weights, weights)
    assert (low, high) == pytest.approx((0.25, 0.25))


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match=r"successes must be in \[0, 3\], got 4"):
        wilson_interval(4, 3)
    with pytest.raises(ValueError, match="trials must be at least 1"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 3, 1.0)
    with pytest.raises(ValueError, match="sums must contain at least one item"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="weights must have the shape"):
        bootstrap_interval([1.0, 2.0], [1.0])
