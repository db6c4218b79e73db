import pytest

from ogpsa_jax.reporting.finding import context, difference, finding
from ogpsa_jax.reporting.rows import aggregate
from ogpsa_jax.runs import ScoreRecord


def _runs(method, general, safety=0.99, answered=None, seeds=3, stage="sft", off=0.0, noise=0.0):
    """Seeds of one method; `off` moves them all, `noise` every second one the other way."""
    found = []
    for seed in range(seeds):
        moved = off * (seed - 1) + noise * (1 - 2 * (seed % 2))
        scores = {"general": general + moved, "safety": safety}
        if answered is not None:
            scores["benign_compliance"] = answered + moved
        found.append(
            ScoreRecord(label=method, method=method, stage=stage, seed=seed, scores=scores)
        )
    return found


def _base():
    return _runs("base", 0.95, 0.0, 1.0, seeds=1, stage="base")


def test_the_best_at_matched_safety_is_named_with_the_difference_and_its_noise():
    records = [
        *_base(),
        *_runs("naive", 0.5),
        *_runs("ours", 0.9, noise=0.01),
        *_runs("theirs", 0.8),
        *_runs("unsafe", 0.94, safety=0.5),
    ]
    # +.01, -.01, +.01 around .1: the standard deviation is .0115, the mean .1033.
    assert finding(records) == (
        "Ours keeps the most general ability at matched safety: 90.3%, 10.3 ± 1.2 points more "
        "than theirs."
    )
    assert context(records) == (
        "Before alignment the general score was 95.0%, after naive tuning 50.0%. Matched safety "
        "is a safety score of 96.0% or more."
    )
    assert "No method reaches a safety score of 99.9%" in finding(records, 0.999)
    assert finding(records, 0.4).startswith("Unsafe keeps the most")


def test_differences_within_their_noise_are_called_level():
    records = [*_runs("naive", 0.5), *_runs("ours", 0.9, noise=0.05), *_runs("theirs", 0.88)]
    assert finding(records) == (
        "Ours and theirs keep the most general ability at matched safety (88.0% to 91.7%, level "
        "within their noise)."
    )


def test_what_seeds_differ_in_is_no_noise_between_methods():
    records = [*_runs("ours", 0.9, off=0.05), *_runs("theirs", 0.88, off=0.05)]
    ours, theirs = aggregate(records)
    mean, noise = difference(records, ours, theirs, "general")
    assert (mean, noise) == pytest.approx((0.02, 0.0))
    apart = [*records[:3], *(r.model_copy(update={"seed": r.seed + 9}) for r in records[3:])]
    assert difference(apart, ours, theirs, "general")[1] > 0.05


def test_of_methods_level_in_general_those_that_help_most_are_named():
    records = [
        *_runs("naive", 0.5, answered=0.0),
        *_runs("ours", 0.9, answered=0.8, noise=0.02),
        *_runs("theirs", 0.9, answered=0.5),
        *_runs("others", 0.9, answered=0.4),
    ]
    told = finding(records)
    assert told.startswith("Ours, theirs and others keep the most general ability")
    assert "; of these, ours answers the most harmless requests: 80.7%, 30.7 ±" in told


def test_where_nothing_can_be_compared_the_finding_says_so():
    assert "no run after alignment was scored" in finding(_base())
    assert "with safety not matched (no naive run)" in finding(
        [*_runs("ours", 0.9), *_runs("theirs", 0.8)]
    )
    assert "Only naive is as safe: it keeps 50.0%" in finding([*_base(), *_runs("naive", 0.5)])
    # One seed and no standard error: nothing is known of chance, so that nobody is ahead.
    single = [*_runs("naive", 0.5, seeds=1), *_runs("ours", 0.9, seeds=1)]
    assert "how far by chance is not known" in finding(single)


def test_with_several_stages_the_last_one_is_told():
    records = [
        *_runs("naive", 0.5),
        *_runs("ours", 0.9),
        *_runs("naive", 0.6, stage="sft+dpo"),
        *_runs("ours", 0.7, stage="sft+dpo"),
    ]
    assert "70.0%" in finding(records)
    assert "90.0%" not in finding(records)
