"""What a run's numbers say: whether it learned anything, and with which basis. Pure functions.

Every rule has its threshold here and is stated in ``docs/training.md``. A rule that applies gives
one sentence with what to set; the sentences go to the terminal and to ``summary.json``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ogpsa_jax.runs import Change

LEAST_FALL = 0.05
"""Share of its first value by which a loss must fall to count as learned."""
LEAST_FALL_OF_PAIRS = 0.005
"""The same of a preference loss: it starts at log 2, and small margins are some percent of it."""
STEEP_END = 0.15
"""Share of the whole fall that lies in the last quarter of the summed learning rate."""
EARLY = 0.5
"""Share of the whole fall that comes before the second refresh."""
NOISE = 0.1
"""Share of the reference gradients' squared norm, or cosine of two sets' gradients, below which a
basis is hardly better than one of random directions."""
MANY_CUT = 0.1
"""Share of a data set's conversations whose answers are cut."""
MUCH_REMOVED = 0.9
"""Mean share of the squared gradient norm that is removed, beyond which that may be why."""
FOREIGN = 0.5
"""Nats a token by which reference answers cost more than answers drawn from the model."""


def paired_change(
    before: Sequence[float], after: Sequence[float], weights: Sequence[float]
) -> Change:
    """The change of Σ loss / Σ weight, with the standard error of a ratio over paired rows.

    Args:
      before: each row's loss, summed over its weight.
      after: the same rows' later.
      weights: target tokens of each row; 1 for a pair.
    """
    difference = np.asarray(after, float) - np.asarray(before, float)
    weight = np.asarray(weights, float)
    rows, total = len(weight), float(weight.sum())
    mean = float(difference.sum()) / total
    if rows < 2:
        return Change(mean, None, rows)
    # Cochran, Sampling Techniques, section 6.4: residuals from the ratio.
    residual = difference - mean * weight
    error = math.sqrt(rows / (rows - 1) * float(np.square(residual).sum())) / total
    return Change(mean, error, rows)


@dataclass(frozen=True)
class Curve:
    """A run's training loss, step by step, with the noise of one step's batch."""

    losses: np.ndarray  # float64 [steps]
    rates: np.ndarray  # float64 [steps], the learning rate of each step

    @classmethod
    def of(cls, steps: Sequence[Mapping[str, Any]]) -> "Curve":
        """From the lines of the steps, in order."""
        losses = np.array([line["loss"] for line in steps], float)
        return cls(losses, np.array([line["learning_rate"] for line in steps], float))

    @property
    def noise(self) -> float:
        """Standard deviation of a step's loss about its trend, from differences of neighbours."""
        differences = np.diff(self.losses)
        spread = np.median(np.abs(differences - np.median(differences)))
        return float(1.4826 * spread / math.sqrt(2))  # of a normal distribution

    @property
    def window(self) -> int:
        """Steps that are averaged for the loss at an end of the curve."""
        return max(1, len(self.losses) // 10)

    @property
    def first(self) -> float:
        """The loss at the start."""
        return float(self.losses[: self.window].mean())

    @property
    def last(self) -> float:
        """The loss at the end."""
        return float(self.losses[-self.window :].mean())

    @property
    def peak(self) -> float:
        """The highest loss, averaged as at the ends."""
        return float(np.convolve(self.losses, np.ones(self.window) / self.window, "valid").max())

    @property
    def jumped(self) -> bool:
        """Whether the loss rose above that of the first step, before any update, and stayed so."""
        # Four standard errors: the peak is the highest of many.
        noise = 4 * self.noise * math.sqrt(1 + 1 / self.window)
        least = max(noise, LEAST_FALL * abs(float(self.losses[0])))
        return self.peak - self.losses[0] > least and self.last > self.losses[0] - self.told_apart

    @property
    def told_apart(self) -> float:
        """The smallest difference between two ends that exceeds the noise: two standard errors."""
        return 2 * self.noise * math.sqrt(2 / self.window)


def judge_training(
    steps: Sequence[Mapping[str, Any]],
    held_out: Mapping[str, tuple[float, Change]],
    interval: str | None = None,
    breadth: str | None = None,
    least_fall: float = LEAST_FALL,
) -> dict[str, str]:
    """What the curve of a finished run says: kind -> a sentence; empty if there is no problem.

    Args:
      steps: the lines of all steps, in order.
      held_out: by set, the loss before and its change.
      interval: the setting by which the basis is refreshed, and its value; None where nothing is
        refreshed at intervals.
      breadth: the setting by which less is projected away, and its value; None without projection.
      least_fall: share of its first value by which a loss must fall to count as learned.
    """
    found: dict[str, str] = {}
    refreshes = [line for line in steps if line.get("refreshed")]
    if len(steps) >= 4 and all(math.isfinite(line["loss"]) for line in steps):
        curve = Curve.of(steps)
        rules = {
            "unmoved": _unmoved(curve, held_out, _much_removed(steps, breadth), least_fall),
            "steep": _steep(curve),
            "early": _early(curve, refreshes, interval),
        }
        found = {kind: sentence for kind, sentence in rules.items() if sentence}
    if interval is not None and len(refreshes) == 1:
        found["early"] = (
            f"the run ends ({len(steps)} steps) before the second refresh, so all of it was "
            f"projected with the basis of the initial weights{_first_cosine(refreshes)}; lower "
            f"{interval}, or train for more steps"
        )
    return found


def _much_removed(steps: Sequence[Mapping[str, Any]], breadth: str | None) -> str:
    shares = [line["removed_fraction"] for line in steps if "removed_fraction" in line]
    if breadth is None or not shares or not (removed := float(np.mean(shares))) > MUCH_REMOVED:
        return ""
    return f"; the projection removed {removed:.1%} of the squared gradient norm: lower {breadth}"


def _unmoved(
    curve: Curve,
    held_out: Mapping[str, tuple[float, Change]],
    removed: str,
    least_fall: float,
) -> str:
    fall = curve.first - curve.last
    if fall > max(curve.told_apart, least_fall * abs(curve.first)) and not curve.jumped:
        return ""
    shown = f"from {curve.first:.4f} to {curve.last:.4f}"
    rate = f"optimizer.learning_rate ({curve.rates.max():g})"
    if -fall > max(curve.told_apart, LEAST_FALL * abs(curve.first)):
        return f"the training loss rose, {shown}; lower {rate}: docs/rates.md"
    if curve.jumped:
        return (
            f"the training loss jumped from {curve.losses[0]:.4f} to {curve.peak:.4f} and ended "
            f"at {curve.last:.4f}; lower {rate}: docs/rates.md"
        )
    for before, change in held_out.values():
        noise = 2 * (change.standard_error or 0.0)
        if -change.mean > max(noise, least_fall * abs(before)):
            return ""
    told_apart = f"noise of the batches ± {curve.told_apart:.4f}"
    others = f", and no held-out loss fell by {least_fall:.1%} either" if held_out else ""
    least = max(least_fall, curve.told_apart / abs(curve.first or 1.0))
    return (
        f"hardly anything was learned: the training loss went {shown} ({told_apart}), which is "
        f"less than {least:.1%} of it{others}; raise {rate} or train for more steps: docs/rates.md"
        f"{removed}"
    )


def _steep(curve: Curve) -> str:
    """The last quarter of the summed rate, not of the steps: a schedule's end hides the slope."""
    # Step i is measured with the weights that the rates before it have made.
    position = np.concatenate([[0.0], np.cumsum(curve.rates)[:-1]])
    if not position[-1] > 0:
        return ""
    position = position / position[-1]
    late = position >= 0.75
    x, y = position[late], curve.losses[late]
    if len(x) < 4:
        return ""
    centred = x - x.mean()
    slope = float(centred @ y) / float(centred @ centred)
    error = curve.noise / math.sqrt(float(centred @ centred))
    fall = curve.first - (float(y.mean()) + slope * (1.0 - float(x.mean())))
    if fall <= curve.told_apart or -slope <= 3 * error or -slope * 0.25 < STEEP_END * fall:
        return ""
    return (
        f"the loss was still falling steeply: {-slope * 0.25 / fall:.0%} of its fall came in the "
        "last quarter of the summed learning rate; train for more steps (train.steps, "
        "train.epochs), or raise optimizer.learning_rate"
    )


def _early(curve: Curve, refreshes: Sequence[Mapping[str, Any]], interval: str | None) -> str:
    fall = curve.first - curve.last
    if interval is None or len(refreshes) < 2 or fall <= curve.told_apart:
        return ""
    # A step's loss is measured before its update: those of the second refresh's step and after it.
    start = refreshes[1]["step"] - 1
    after = curve.losses[start : start + curve.window]
    share = (curve.first - float(after.mean())) / fall
    # Where the noise would have to fall just so for the share to be more than half, it is not.
    doubt = curve.noise * math.sqrt(1 / len(after) + 1 / curve.window) / fall
    if share - doubt < EARLY:
        return ""
    return (
        f"{min(share, 1.0):.0%} of the fall of the loss came before the second refresh (after step "
        f"{start}), so it was projected with the basis of the initial weights, which by then held "
        f"{refreshes[1].get('reference/captured_fraction', math.nan):.1%} of the reference "
        f"gradients; lower {interval} or optimizer.learning_rate ({curve.rates.max():g})"
    )


def judge_first_basis(refreshes: Sequence[Mapping[str, Any]], interval: str) -> str:
    """Whether what was projected before the second refresh had to do with the references.

    Args:
      refreshes: the lines of the steps with the first two refreshes; fewer: nothing is said.
      interval: the setting by which the basis is refreshed, and its value.
    """
    if len(refreshes) < 2 or refreshes[0].get("effective_rank") == 0:
        return ""
    held = refreshes[1].get("reference/captured_fraction", 1.0)
    if not held < NOISE:
        return ""
    return (
        f"the first basis covered only {held:.1%} of the reference gradients at the second refresh "
        f"(after step {refreshes[1]['step'] - 1}), so what was projected until then had little to "
        f"do with them{_first_cosine(refreshes)}; lower {interval}, take more reference rows, or "
        "set references.in_step"
    )


def _first_cosine(refreshes: Sequence[Mapping[str, Any]]) -> str:
    """Where it says so, that the sets' gradients were noise at the first refresh."""
    cosine = refreshes[0].get("reference/gradient_cosine", 1.0)
    if not abs(cosine) < NOISE:
        return ""
    return (
        ", and much of it is noise: at the first refresh the cosine of the sets' gradients was "
        f"{cosine:.2f}"
    )


def judge_references(name: str, loss: float, entropy: float, replayed: bool) -> str:
    """Whether the model would give the reference answers itself, before training.

    Answers drawn from the model cost, on average, its entropy. A higher cost shows answers in
    another's words.

    Args:
      name: of the reference set.
      loss: nats a target token, by the model that training starts from.
      entropy: of that model's predictions at the same tokens, nats.
      replayed: whether the reference rows are trained on as well.
    """
    if not loss - entropy > FOREIGN:
        return ""
    sentence = (
        f"{name}: the reference answers start at a high loss ({loss:.2f} nats a token, where the "
        f"model's own answers would cost {entropy:.2f}), so they are not what the model would say"
    )
    if replayed:
        return (
            f"{sentence}, and training on them teaches it something else; set references.target to "
            "initial, references.answers to own, or references.in_step.replay_weight to 0"
        )
    return f"{sentence}; set references.target to initial, or references.answers to own"


def judge_lengths(name: str, lengths: Sequence[int], max_length: int, limit: int) -> str:
    """Whether many answers of a data set are cut.

    Args:
      name: of the data set.
      lengths: tokens of each conversation before it was cut.
      max_length: tokens that are kept.
      limit: tokens that the model can read.
    """
    cut = sum(length > max_length for length in lengths)
    if not lengths or cut <= MANY_CUT * len(lengths):
        return ""
    most = int(np.quantile(lengths, 0.95, method="higher"))
    needed = f"{most} suffices for 95 % of the rows, {max(lengths)} for all"
    if most > limit:
        needed += f"; the model reads {limit} at most, so shorten or leave out the longest rows"
    return (
        f"{name}: the answers of {cut} of {len(lengths)} rows ({cut / len(lengths):.0%}) are cut, "
        f"so the model does not learn to end them; raise data.max_length ({max_length}): {needed}"
    )
