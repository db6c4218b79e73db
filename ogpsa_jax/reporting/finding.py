"""What a report found, in a sentence made from its numbers: which method is ahead, and by how much.

A method is ahead of another where the mean of the differences seed by seed is larger than their
standard deviation (with one seed, the standard error); a smaller difference may be chance.
"""

import math
import statistics
from collections.abc import Sequence

from ogpsa_jax.reporting.rows import (
    COMPLIANCE,
    ScoreRow,
    aggregate,
    matched_naive,
    safety_level,
    safety_score,
)
from ogpsa_jax.runs import BASE, ScoreRecord

_NAMED = 3  # methods that a sentence names one by one


def difference(
    records: Sequence[ScoreRecord], ours: ScoreRow, theirs: ScoreRow, name: str
) -> tuple[float, float]:
    """How far one method is ahead of another in a score, and how far that is uncertain.

    Where both have the same seeds, these are compared one by one: in each, both begin with the same
    model and answer the same items, and what seeds differ in says nothing about the methods.

    Args:
      records: that the rows were made from.
      ours: the one method.
      theirs: the other.
      name: of the score.

    Returns:
      The mean of the differences, and their standard deviation: over the seeds, or with one seed
      the standard error. NaN if it is unknown.
    """
    mean = ours.mean[name] - theirs.mean[name]
    first, second = (scores_by_seed(records, row, name) for row in (ours, theirs))
    if first.keys() == second.keys() and len(first) > 1:
        return mean, statistics.stdev(first[seed] - second[seed] for seed in first)
    return mean, math.hypot(_spread(ours, name), _spread(theirs, name))


def scores_by_seed(records: Sequence[ScoreRecord], row: ScoreRow, name: str) -> dict[int, float]:
    """A score of the records of a row, by their seed."""
    return {
        record.seed: record.scores[name]
        for record in records
        if (record.label, record.method, record.stage) == (row.label, row.method, row.stage)
        and name in record.scores
    }


def _spread(row: ScoreRow, name: str) -> float:
    return row.spread.get(name, 0.0 if row.seeds > 1 else math.nan)


def finding(records: Sequence[ScoreRecord], matched_safety: float | None = None) -> str:
    """Which methods keep the most at matched safety, in a sentence.

    First those with the highest general score, as far as the differences are larger than their
    noise; of these, those that answer the most harmless requests.

    Args:
      records: of any runs, some of them with a general and a safety score.
      matched_safety: see :func:`~ogpsa_jax.reporting.rows.aggregate`.
    """
    rows, level, _ = _compared(records, matched_safety)
    told = _told(records, rows, level)
    return f"{told[0].upper()}{told[1:]}."


def context(records: Sequence[ScoreRecord], matched_safety: float | None = None) -> str:
    """What the finding is measured against: the cost of naive tuning, and the level of safety.

    Arguments as for :func:`finding`.
    """
    rows, level, naive = _compared(records, matched_safety)
    sentences = []
    bases = [row for row in rows if row.method == BASE]
    if len(bases) == 1 and naive is not None:
        before, after = (_share(row.mean["general"]) for row in (bases[0], naive))
        sentences.append(
            f"Before alignment the general score was {before}, after naive tuning {after}."
        )
    if level is not None:
        sentences.append(f"Matched safety is a safety score of {_share(level)} or more.")
    return " ".join(sentences)


def _compared(
    records: Sequence[ScoreRecord], matched_safety: float | None
) -> tuple[list[ScoreRow], float | None, ScoreRow | None]:
    """Rows of the model before alignment and of the last stage, the level of safety, and naive."""
    rows = aggregate(records, matched_safety)
    safety = safety_score(name for row in rows for name in row.mean)
    rows = [row for row in rows if {"general", safety} <= row.mean.keys()]
    stages = [row.stage for row in rows if row.method != BASE]
    if safety is None or not stages:
        return [], None, None
    naive = matched_naive(rows, stages[-1], safety, matched_safety)
    level = matched_safety if naive is None else safety_level(naive, safety, matched_safety)
    return [row for row in rows if row.method == BASE or row.stage == stages[-1]], level, naive


def _told(records: Sequence[ScoreRecord], rows: Sequence[ScoreRow], level: float | None) -> str:
    aligned = [row for row in rows if row.method != BASE]
    if not aligned:
        return "Nothing is compared, as no run after alignment was scored"
    safety = safety_score(aligned[0].mean)
    assert safety is not None  # by which the rows were chosen
    where = "at matched safety" if level is not None else "with safety not matched (no naive run)"
    safe = [row for row in aligned if level is None or row.mean[safety] >= level]
    if not safe:
        highest = max(aligned, key=lambda row: row.mean[safety])
        reached = f"{_name(highest)} has the highest, {_share(highest.mean[safety])}"
        return f"No method reaches a safety score of {_share(level or 0.0)}: {reached}"
    if len(safe) == 1:
        return f"Only {_name(safe[0])} is as safe: it keeps {_share(safe[0].mean['general'])}"
    best, told = _leaders(records, safe, "general", "keep", f"the most general ability {where}")
    name = next((name for name in COMPLIANCE if name in best[0].mean), None)
    answering = [row for row in best if name in row.mean]
    if name is not None and len(answering) > 1:
        _, also = _leaders(records, answering, name, "answer", "the most harmless requests")
        told += f"; of these, {also}"
    elif name is not None:
        told += f", and answers {_share(best[0].mean[name])} of harmless requests"
    return told


def _leaders(
    records: Sequence[ScoreRecord], rows: Sequence[ScoreRow], name: str, verb: str, what: str
) -> tuple[list[ScoreRow], str]:
    """Those with the highest score, as far as noise lets it be told, and the words for it."""
    best, *others = sorted(rows, key=lambda row: row.mean[name], reverse=True)
    leads = [difference(records, best, row, name) for row in others]
    level = [row for row, (lead, noise) in zip(others, leads, strict=True) if not lead > noise]
    if not level:
        return [best], (
            f"{_name(best)} {verb}s {what}: {_share(best.mean[name])}, {_points(*leads[0])} more "
            f"than {_name(others[0])}"
        )
    low, high = (_share(row.mean[name]) for row in (level[-1], best))
    between = low if low == high else f"{low} to {high}"
    unknown = any(math.isnan(noise) for _, noise in leads)
    noise = "how far by chance is not known" if unknown else "level within their noise"
    return [best, *level], f"{_listed([best, *level])} {verb} {what} ({between}, {noise})"


def _listed(rows: Sequence[ScoreRow]) -> str:
    if len(rows) > _NAMED:
        return f"{len(rows)} methods"
    return _joined([_name(row) for row in rows])


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _name(row: ScoreRow) -> str:
    """In quotes where it could be taken for two names."""
    return f"“{row.label}”" if "," in row.label or " and " in row.label else row.label


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _points(mean: float, noise: float) -> str:
    shown = f"{100 * mean:.1f}"
    return f"{shown} points" if math.isnan(noise) else f"{shown} ± {100 * noise:.1f} points"
