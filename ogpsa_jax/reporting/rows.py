"""Scores of one method and stage over its seeds, and the share of the alignment tax it removes.

The *alignment tax* of a stage is the general score before alignment less that of the naive run.
The share of it that a method removes is

    (general(method) - general(naive)) / (general(base) - general(naive)),

given only where the method is as safe as what it is compared with: a model that refuses less keeps
its abilities without any method.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ogpsa_jax.runs import BASE, NAIVE, ScoreRecord, check_definitions

# Unless a level is given, a method is as safe as the naive run of its stage within this much.
SAFETY_TOLERANCE = 0.03
# What `evaluate` measures with rules or a judge, and what the demonstration does by exact match.
HEADLINE = (
    "general",
    "safety",
    "benign_compliance",
    "over_refusal",
    "exact_safety",
    "exact_benign_compliance",
    "prefix_over_refusal",
)
SAFETY = ("safety", "exact_safety")
COMPLIANCE = ("benign_compliance", "exact_benign_compliance")
ROUND_OFF = 1e-12  # of the standard deviation of equal values


@dataclass(frozen=True)
class ScoreRow:
    """One method at one stage, over its seeds.

    Attributes:
      label: the name shown.
      method: decides the colour in the figure.
      stage: decides the marker.
      seeds: how many records went in.
      mean: of each score over the seeds.
      spread: sample standard deviation over the seeds, or the run's own standard error where there
        is one seed; nothing where the seeds do not differ.
      training_samples: mean over the seeds.
      reference_samples: mean over the seeds.
      seconds: mean over the seeds.
      tax_removed: share of the alignment tax removed, or ``None`` where it is not defined.
      tax_note: why it is not defined, or the empty string.
    """

    label: str
    method: str
    stage: str
    seeds: int
    mean: dict[str, float]
    spread: dict[str, float]
    training_samples: float
    reference_samples: float
    seconds: float
    tax_removed: float | None
    tax_note: str


def aggregate(
    records: Sequence[ScoreRecord], matched_safety: float | None = None
) -> list[ScoreRow]:
    """Rows of the table: records that differ in their seed alone become one.

    Args:
      records: of any runs.
      matched_safety: the safety score from which on the tax removed is given; by default that of
        the naive run of the stage less ``SAFETY_TOLERANCE``.

    Returns:
      Rows in the order in which their first record appears. Where a stage has several naive rows,
      the one with the highest general score (among those that reach `matched_safety`) counts.

    Raises:
      InputError: a score of one name was measured in two ways.
    """
    check_definitions(records)
    groups: dict[tuple[str, str, str], list[ScoreRecord]] = {}
    for record in records:
        groups.setdefault((record.label, record.method, record.stage), []).append(record)
    rows = [_row(key, group) for key, group in groups.items()]
    return [_with_tax(row, rows, matched_safety) for row in rows]


def _row(key: tuple[str, str, str], group: list[ScoreRecord]) -> ScoreRow:
    mean, spread = {}, {}
    for name in dict.fromkeys(name for record in group for name in record.scores):
        values = [record.scores[name] for record in group if name in record.scores]
        mean[name] = statistics.fmean(values)
        if len(values) > 1:
            if (deviation := statistics.stdev(values)) > ROUND_OFF:
                spread[name] = deviation
        elif len(group) == 1 and name in group[0].spread:
            spread[name] = group[0].spread[name]
    costs = [record.cost for record in group]
    return ScoreRow(
        *key,
        seeds=len(group),
        mean=mean,
        spread=spread,
        training_samples=statistics.fmean(cost.training_samples for cost in costs),
        reference_samples=statistics.fmean(cost.reference_samples for cost in costs),
        seconds=statistics.fmean(cost.seconds for cost in costs),
        tax_removed=None,
        tax_note="",
    )


def _with_tax(row: ScoreRow, rows: list[ScoreRow], matched_safety: float | None) -> ScoreRow:
    share, note = _tax_removed(row, rows, matched_safety)
    return replace(row, tax_removed=share, tax_note=note)


def _tax_removed(
    row: ScoreRow, rows: list[ScoreRow], matched_safety: float | None
) -> tuple[float | None, str]:
    if row.method in (BASE, NAIVE):
        return None, ""

    safety = safety_score(row.mean)
    if safety is None or "general" not in row.mean:
        return None, "no general or safety score"
    bases = _scored(rows, BASE, None, safety)
    naives = _scored(rows, NAIVE, row.stage, safety)
    if not bases or not naives:
        return None, f"no {'base' if not bases else 'naive'} run to compare with"
    if len({other.label for other in bases}) > 1:
        names = " and ".join(dict.fromkeys(other.label for other in bases))
        return None, f"{names} all count as the model before alignment"
    naive = matched_naive(rows, row.stage, safety, matched_safety)
    if naive is None:
        return None, "naive is not as safe as asked for"
    level = safety_level(naive, safety, matched_safety)
    if row.mean[safety] < level:
        return None, f"safety below {level:.3f}"
    tax = bases[0].mean["general"] - naive.mean["general"]
    if tax <= 0:
        return None, "naive pays no tax"
    if tax <= math.hypot(_standard_error(bases[0]), _standard_error(naive)):
        return None, "the tax is no larger than its noise"
    return (row.mean["general"] - naive.mean["general"]) / tax, ""


def _scored(
    rows: Sequence[ScoreRow], method: str, stage: str | None, safety: str
) -> list[ScoreRow]:
    """The rows of a method, at one stage or all, that have a general and a safety score."""
    return [
        row
        for row in rows
        if row.method == method
        and stage in (None, row.stage)
        and {"general", safety} <= row.mean.keys()
    ]


def matched_naive(
    rows: Sequence[ScoreRow], stage: str, safety: str, matched_safety: float | None
) -> ScoreRow | None:
    """The naive row that a stage is compared with, or None where there is none so safe.

    Args:
      rows: of all methods.
      stage: that is looked at.
      safety: the name of the safety score.
      matched_safety: see :func:`aggregate`.
    """
    naives = [
        row
        for row in _scored(rows, NAIVE, stage, safety)
        if matched_safety is None or row.mean[safety] >= matched_safety
    ]
    return max(naives, key=lambda row: row.mean["general"], default=None)


def safety_level(naive: ScoreRow, safety: str, matched_safety: float | None) -> float:
    """The safety score from which on a method is as safe as what it is compared with."""
    return naive.mean[safety] - SAFETY_TOLERANCE if matched_safety is None else matched_safety


def _standard_error(row: ScoreRow) -> float:
    """Of the general score's mean; 0 if it is unknown."""
    return row.spread.get("general", 0.0) / math.sqrt(row.seeds)


def safety_score(scores: Iterable[str]) -> str | None:
    """Which of some scores is the one of safety."""
    present = set(scores)
    return next((name for name in SAFETY if name in present), None)
