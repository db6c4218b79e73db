"""What is said of a run, on curves that are made up."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ogpsa_jax.runs import Change
from ogpsa_jax.training.summary import judge_curve
from ogpsa_jax.training.verdict import (
    LEAST_FALL_OF_PAIRS,
    judge_first_basis,
    judge_lengths,
    judge_references,
    judge_training,
    paired_change,
)

Shape = Callable[[float], float]


@pytest.fixture
def rng() -> np.random.Generator:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def curve(
    rng: np.random.Generator,
    shape: Shape,
    *,
    steps: int = 120,
    noise: float = 0.02,
    schedule: str = "cosine",
) -> list[dict[str, Any]]:
    """Lines of steps whose loss is `shape` of the share of the summed learning rate so far."""
    phase = np.arange(steps) / steps
    rates = {"cosine": (1 + np.cos(np.pi * phase)) / 2, "constant": np.ones(steps)}[schedule]
    spent = np.concatenate([[0.0], np.cumsum(rates)[:-1]])
    spent /= spent[-1]
    return [
        {
            "step": i + 1,
            "loss": shape(float(at)) + noise * float(rng.standard_normal()),
            "learning_rate": 1e-5 * float(rate),
        }
        for i, (at, rate) in enumerate(zip(spent, rates, strict=True))
    ]


def decay(start: float, end: float, sharpness: float) -> Shape:
    """Exponential decay that has `sharpness` time constants in the run."""
    whole = 1 - math.exp(-sharpness)
    return lambda x: start - (start - end) * (1 - math.exp(-sharpness * x)) / whole


WELL = decay(2.7, 1.6, 5.0)


def refreshed(
    lines: list[dict[str, Any]], every: int, captured: float = 0.5
) -> list[dict[str, Any]]:
    """The lines of a run that refreshes so often."""
    for line in lines[::every]:
        line |= {"refreshed": True, "reference/captured_fraction": captured}
    return lines


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [40, 120, 2000])
def test_nothing_is_said_of_a_run_that_learned(rng, schedule, steps):
    assert judge_training(curve(rng, WELL, schedule=schedule, steps=steps), {}) == {}


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(
    "shape",
    [lambda x: 2.7, lambda x: 2.67 - 0.04 * x, lambda x: 0.6931 - 0.004 * x],
    ids=["flat", "by .04 of 2.67", "a preference loss"],
)
def test_a_run_that_hardly_moved_is_told(rng, shape, schedule):
    told = judge_training(curve(rng, shape, schedule=schedule, noise=0.002), {})
    assert "hardly anything was learned" in told["unmoved"]
    assert "optimizer.learning_rate (1e-05)" in told["unmoved"]
    assert "docs/rates.md" in told["unmoved"]


def test_a_fall_within_the_noise_of_the_batches_is_not_learning(rng):
    lines = curve(rng, lambda x: 2.0, noise=0.5, steps=20)
    for i in (0, 1):  # whatever was drawn, it ends 8 % lower, where a step's batch is off by 25 %
        lines[i]["loss"], lines[-1 - i]["loss"] = 2.0, 1.84
    assert "noise of the batches" in judge_training(lines, {})["unmoved"]


def test_a_run_whose_gradient_was_nearly_all_removed_is_told_so(rng):
    for removed, told in ((0.85, False), (0.95, True)):
        lines = [line | {"removed_fraction": removed} for line in curve(rng, lambda x: 2.0)]
        sentence = judge_training(lines, {}, breadth="ogpsa.energy (0.98)")["unmoved"]
        why = "removed 95.0% of the squared gradient norm: lower ogpsa.energy (0.98)"
        assert (why in sentence) == told
        assert "removed" not in judge_training(lines, {})["unmoved"]
        lines = [line | {"removed_fraction": removed} for line in curve(rng, WELL)]
        assert judge_training(lines, {}, breadth="ogpsa.energy (0.98)") == {}


@pytest.mark.parametrize("subspace", ["gradients", "inputs"])
def test_a_subspace_that_is_spanned_once_has_no_second_refresh(rng, subspace, configured, tmp_path):
    preset = {"inputs": "recommended", "gradients": "paper"}[subspace]
    config = configured(tmp_path, f"ogpsa={{preset: {preset}}}", "references.in_step=null")
    lines = [line | {"removed_fraction": 0.99} for line in curve(rng, lambda x: 2.0, steps=20)]
    lines[0]["refreshed"] = True
    (unmoved, *early) = judge_curve(config, lines)
    setting = {"inputs": "ogpsa.energy (0.98)", "gradients": "ogpsa.rank ("}[subspace]
    assert f"lower {setting}" in unmoved
    assert [("second refresh" in sentence) for sentence in early] == [True] * (
        subspace == "gradients"
    )


def test_a_held_out_loss_that_fell_beyond_its_noise_is_learning(rng):
    lines = curve(rng, lambda x: 2.0 - 0.2 * x, noise=1.5)
    for line in lines[-12:]:  # whatever was drawn, the ends are level
        line["loss"] = sum(line["loss"] for line in lines[:12]) / 12
    assert "unmoved" in judge_training(lines, {})
    assert "unmoved" not in judge_training(lines, {"safety": (2.0, Change(-0.2, 0.02, 100))})
    assert "unmoved" in judge_training(lines, {"safety": (2.0, Change(-0.2, 0.15, 100))})
    assert "unmoved" in judge_training(lines, {"safety": (2.0, Change(-0.02, 0.001, 100))})
    assert "unmoved" in judge_training(lines, {"safety": (2.0, Change(+0.5, 0.02, 100))})


def test_of_a_preference_loss_a_small_fall_is_learning(rng):
    """From log 2 by 2 %, with a tenth of that as noise."""
    lines = [
        {"loss": 0.693 - 0.014 * i / 99 + 0.0014 * rng.standard_normal(), "learning_rate": 1e-5}
        for i in range(100)
    ]
    assert "unmoved" in judge_training(lines, {})
    assert "unmoved" not in judge_training(lines, {}, least_fall=LEAST_FALL_OF_PAIRS)
    flat = [{**line, "loss": 0.693 + 0.0014 * rng.standard_normal()} for line in lines]
    assert "unmoved" in judge_training(flat, {}, least_fall=LEAST_FALL_OF_PAIRS)


def test_a_loss_that_jumped_and_never_came_back_is_told(rng):
    """The first steps' mean holds the jump, from which the loss then falls."""
    start = curve(rng, WELL, steps=20)
    jumped = [4.57, 5.68, 5.35, 4.84, *[4.7] * 6, *[4.62] * 10]
    lines = [line | {"loss": loss} for line, loss in zip(start, jumped, strict=True)]
    held_out = {"general": (4.9, Change(-0.9, 0.01, 100))}  # whatever is trained on of the replayed
    for sets in ({}, held_out):
        told = judge_training(lines, sets)["unmoved"]
        assert "jumped from 4.5700 to 5.5150 and ended at 4.6200; lower optimizer" in told
    for i in range(10, 20):  # it came back, and learned
        lines[i]["loss"] = 3.5
    assert "unmoved" not in judge_training(lines, {})


@pytest.mark.parametrize("noise", [0.02, 0.2, 1.0])
def test_noise_is_no_jump(rng, noise):
    lines = curve(rng, lambda x: 4.0, steps=300, noise=noise)
    lines[0]["loss"] = 4.0 - noise  # a lucky first batch
    assert "jumped" not in judge_training(lines, {}).get("unmoved", "")


def test_a_loss_that_rose_is_told(rng):
    told = judge_training(curve(rng, lambda x: 2.0 + x), {})
    assert "rose, from 2." in told["unmoved"]
    assert "lower optimizer.learning_rate" in told["unmoved"]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_loss_that_still_falls_steeply_is_told(rng, schedule):
    told = judge_training(curve(rng, lambda x: 2.7 - 1.1 * x, schedule=schedule), {})
    assert told.keys() == {"steep"}
    assert "train.steps" in told["steep"]


def test_most_of_the_movement_before_the_second_refresh_is_told(rng):
    lines = refreshed(curve(rng, WELL), 60, captured=0.37)
    told = judge_training(lines, {}, "ogpsa.refresh.every (60)")
    assert told.keys() == {"early"}
    assert "before the second refresh (after step 60)" in told["early"]
    assert "by then held 37.0% of the reference gradients" in told["early"]
    assert "lower ogpsa.refresh.every (60) or optimizer.learning_rate (1e-05)" in told["early"]
    assert judge_training(lines, {}) == {}
    lines = refreshed(curve(rng, WELL), 5)
    assert judge_training(lines, {}, "ogpsa.refresh.every (5)") == {}


def test_it_is_the_second_refresh_that_counts_wherever_it_comes(rng):
    """As by distance, where the intervals differ."""
    for second, kinds in ((60, {"early"}), (4, set())):
        lines = curve(rng, WELL)
        for step in (0, second, 90):
            lines[step] |= {"refreshed": True, "reference/captured_fraction": 0.5}
        assert judge_training(lines, {}, "ogpsa.refresh.distance (0.01)").keys() == kinds


@pytest.mark.parametrize("captured, told", [(0.012, True), (0.26, False)])
def test_a_first_basis_that_is_noise_is_told(captured, told):
    first = {"step": 1, "effective_rank": 2.0, "reference/gradient_cosine": 0.05}
    second = {"step": 31, "effective_rank": 2.0, "reference/captured_fraction": captured}
    sentence = judge_first_basis([first, second], "ogpsa.refresh.every (30)")
    assert bool(sentence) == told
    assert not judge_first_basis([first], "ogpsa.refresh.every (30)")
    assert not judge_first_basis([first | {"effective_rank": 0.0}, second], "")  # told elsewhere
    if told:
        assert "covered only 1.2% of the reference gradients at the second refresh" in sentence
        assert "cosine of the sets' gradients was 0.05; lower ogpsa.refresh.every (30)" in sentence
        agreeing = first | {"reference/gradient_cosine": 0.6}
        assert "cosine" not in judge_first_basis([agreeing, second], "ogpsa.refresh.every (30)")


def test_a_run_without_a_second_refresh_is_told(rng):
    lines = refreshed(curve(rng, WELL, steps=30), 30)
    early = judge_training(lines, {}, "ogpsa.refresh.every (30)")["early"]
    assert "ends (30 steps) before the second refresh" in early
    assert "noise" not in early
    lines[0]["reference/gradient_cosine"] = 0.05
    early = judge_training(lines, {}, "ogpsa.refresh.every (30)")["early"]
    assert "much of it is noise" in early
    assert judge_training(lines, {}) == {}


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_curve_of_few_steps_is_not_judged(rng, steps):
    assert judge_training(curve(rng, lambda x: 2.0, steps=max(steps, 2))[:steps], {}) == {}


def test_a_curve_with_a_hole_is_not_judged(rng):
    lines = curve(rng, lambda x: 2.0)
    lines[7]["loss"] = math.nan
    assert judge_training(lines, {}) == {}


def test_the_standard_error_is_that_of_drawing_other_rows(rng):
    """Against the spread over many draws of the rows from one population."""
    population, rows, draws = 4000, 200, 600
    weights = rng.integers(1, 60, population).astype(float)
    before = weights * rng.gamma(4.0, 0.5, population)
    after = before - weights * rng.normal(0.1, 0.3, population)
    picked = [rng.choice(population, rows, replace=False) for _ in range(draws)]
    changes = [paired_change(before[i], after[i], weights[i]) for i in picked]
    spread = float(np.std([change.mean for change in changes]))
    typical = float(np.mean([change.standard_error for change in changes]))
    # A spread over 600 draws is known to 1/sqrt(2 * 600) = 3 %, and drawing without replacement
    # takes 2.5 % off it; four of those standard deviations.
    assert typical == pytest.approx(spread, rel=0.15)
    # Pairing is what makes it small: the rows themselves differ far more.
    unpaired = np.std([before[i].sum() / weights[i].sum() for i in picked]) * math.sqrt(2)
    assert typical < unpaired


def test_of_pairs_it_is_the_usual_standard_error(rng):
    difference = rng.normal(size=50)
    change = paired_change(np.zeros(50), difference, np.ones(50))
    assert change.mean == pytest.approx(difference.mean())
    assert change.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(50))
    assert paired_change([1.0], [0.5], [2.0]) == Change(-0.25, None, 1)


def test_references_in_the_words_of_another_are_told():
    assert judge_references("references.0", 0.01, 0.02, replayed=True) == ""
    assert judge_references("references.0", 4.9, 5.0, replayed=True) == ""  # knows nothing yet
    told = judge_references("references.0", 7.5, 0.05, replayed=True)
    assert "start at a high loss (7.50 nats" in told
    assert "references.in_step.replay_weight" in told
    assert "replay_weight" not in judge_references("references.0", 7.5, 0.05, replayed=False)


def test_many_cut_answers_are_told_with_the_length_that_holds_them():
    lengths = [100] * 80 + [300] * 16 + [900] * 4
    assert judge_lengths("train", lengths, 300, 2048) == ""
    told = judge_lengths("train", lengths, 256, 2048)
    assert "20 of 100 rows (20%)" in told
    assert "raise data.max_length (256): 300 suffices for 95 % of the rows, 900 for all" in told
    assert "the model reads 280 at most" in judge_lengths("train", lengths, 256, 280)
    assert judge_lengths("train", [], 256, 2048) == ""
