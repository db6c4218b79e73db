"""The content of ``summary.json``, computed from a run's metrics."""

from collections.abc import Sequence
from typing import Any

from ogpsa_jax.config import RunConfig
from ogpsa_jax.runs import ProjectionFigures, TrainLoss
from ogpsa_jax.training.loop import Workload
from ogpsa_jax.training.metrics import (
    Line,
    find_capped,
    find_foreign_references,
    find_lost_updates,
    find_noise,
    find_problems,
    held_out_changes,
)
from ogpsa_jax.training.refreshing import in_turn
from ogpsa_jax.training.verdict import LEAST_FALL, LEAST_FALL_OF_PAIRS, judge_training


def summarise(config: RunConfig, lines: list[Line]) -> dict[str, Any]:
    """The fields of :class:`~ogpsa_jax.runs.Summary` that are made of a run's metrics alone."""
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "loss" not in line]
    total = steps[-1]["step"]
    return {
        "name": config.name,
        "objective": config.objective,
        "preset": config.ogpsa.preset,
        "seed": config.seed,
        "steps": total,
        "train_loss": TrainLoss(
            first=steps[0]["loss"] if steps[0]["step"] == 1 else None, last=steps[-1]["loss"]
        ),
        "before": measured_before(lines),
        "after": _held_out(evaluations[-1]) if evaluations else {},
        "change": {f"{name}/loss": change for name, (_, change) in held_out_changes(lines).items()},
        "projection": _projection(steps) if config.projects else None,
        # Sequences, as everywhere: a pair is two.
        "training_samples": total
        * (config.train.batch_size - config.reference_rows)
        * (2 if config.objective == "dpo" else 1),
    }


def _projection(steps: Sequence[Line]) -> ProjectionFigures:
    removed = [line["removed_fraction"] for line in steps if "removed_fraction" in line]
    last = steps[-1]
    return ProjectionFigures(
        refreshes=_refreshes(steps),
        refused_refreshes=last.get("refused_refreshes"),
        effective_rank=last.get("effective_rank"),
        mean_removed_fraction=sum(removed) / len(removed) if removed else None,
        reference_coverage=last.get("reference_coverage"),
        least_coverage=last.get("least_coverage"),
    )


def curve_warnings(config: RunConfig, lines: list[Line]) -> list[str]:
    """What the metrics of a finished run warn of."""
    steps = [line for line in lines if "loss" in line]
    found = [
        *find_problems(steps).values(),
        *find_lost_updates(steps, config).values(),
        *find_capped(steps, config.ogpsa).values(),
        *find_noise(steps, config).values(),
        *find_foreign_references(lines, config),
    ]
    total = steps[-1]["step"]
    if missing := total - len({line["step"] for line in steps}):
        found.append(f"the metrics of {missing} of {total} steps are lost; so is what needs them")
    return found + judge_curve(config, lines)


def judge_curve(config: RunConfig, lines: Sequence[Line]) -> list[str]:
    """What the whole curve says of the training; nothing where steps of it are lost."""
    steps = [line for line in lines if "loss" in line]
    if [line["step"] for line in steps] != list(range(1, len(steps) + 1)):
        return []
    ogpsa, interval, breadth = config.ogpsa, None, None
    if config.projects and ogpsa.subspace == "inputs":  # spanned once, before training
        breadth = f"ogpsa.energy ({ogpsa.energy})"
    elif config.projects:
        interval = ogpsa.refresh.shown if ogpsa.refresh else None
        breadth = f"ogpsa.rank ({ogpsa.rank})"
    least_fall = LEAST_FALL_OF_PAIRS if config.objective == "dpo" else LEAST_FALL
    found = judge_training(steps, held_out_changes(lines), interval, breadth, least_fall)
    if find_lost_updates(steps, config):
        found.pop("unmoved", None)  # that warning names the reason, and another remedy
    return list(found.values())


def reference_samples(workload: Workload, config: RunConfig, lines: Sequence[Line]) -> int:
    """Sequences of references that went through the model, in all; a pair is two."""
    refreshes = _refreshes([line for line in lines if "loss" in line]) if config.projects else 0
    rows = workload.reference_rows * (len(workload.batches) if config.reference_rows else refreshes)
    if workload.batches_per_refresh is not None:
        taken = [
            batches["segment_ids"]
            for number in range(refreshes)
            for batches in in_turn(workload.references, number, workload.batches_per_refresh)
        ]
        # What fills up a batch has no token.
        rows = sum(int(ids.reshape(*ids.shape[:2], -1).any(axis=-1).sum()) for ids in taken)
    return rows * (2 if config.references.loss in ("dpo", "official") else 1)


def _refreshes(steps: Sequence[Line]) -> int:
    """How often references went into the basis, or were refused, by the end of these steps."""
    return int(steps[-1].get("refreshes", 0)) + int(steps[-1].get("refused_refreshes", 0))


def measured_before(lines: Sequence[Line]) -> Line:
    """The measures of before the first step, where the metrics still contain them."""
    first = next((line for line in lines if "loss" not in line), None)
    return _held_out(first) if first is not None and first["step"] == 0 else {}


def _held_out(line: Line) -> Line:
    return {
        name.removeprefix("eval/"): value
        for name, value in line.items()
        if name.startswith("eval/")
    }
