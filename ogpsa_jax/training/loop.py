"""The training loop: refresh, step, evaluate, log, save; killed at any instant, it goes on exactly.

Nothing here reads files of models or data: see :mod:`ogpsa_jax.training.run` for that.
"""

import contextlib
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ogpsa_jax import diagnostics
from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import RefreshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.projection.find import find_states
from ogpsa_jax.training.checkpoints import Checkpoints
from ogpsa_jax.training.mesh import shard_rows
from ogpsa_jax.training.metrics import (
    Line,
    MetricsLog,
    find_capped,
    find_foreign_references,
    find_lost_updates,
    find_noise,
    find_problems,
)
from ogpsa_jax.training.optimizer import learning_rate, make_optimizer
from ogpsa_jax.training.progress import RunProgress
from ogpsa_jax.training.step import (
    Network,
    Objective,
    TrainState,
    distance_moved,
    first_state,
    make_evaluation,
    make_input_subspace,
    make_refresh,
    make_train_step,
)

logger = logging.getLogger(__name__)
HostBatch = dict[str, np.ndarray]
_OVERSAMPLED = 64  # columns of a wide layer's sketch beyond the rank


class Batches(Protocol):
    """Training data by step: the same step always gives the same batch."""

    def __len__(self) -> int:
        """Optimizer steps in total."""

    def batch(self, step: int) -> HostBatch:
        """Arrays [micro-batches, rows, ...] of 0-based `step`."""


@dataclass(frozen=True)
class Evaluation:
    """A held-out set: batches stacked as [batches, rows, ...] and what is measured on them.

    Where the objective gives ``row_loss`` and ``row_weight``, the lines of before and after keep
    them, so that both can be compared row by row.
    """

    batches: HostBatch
    objective: Objective


@dataclass(frozen=True)
class Workload:
    """What is trained, on what, against what.

    Attributes:
      objective: what is minimised.
      batches: the training rows of every step.
      references: reference sets, each stacked as [batches, rows, ...]; their gradients span the
        basis at every refresh.
      reference_rows: rows of all of them together.
      batches_per_refresh: how many batches of each set a refresh takes, in turn; None: all.
      reference_loss: what is differentiated on reference rows.
      in_step_batches: instead of `references`, the reference batch of every step.
      reference_starts: rows of each reference set, by name, whose loss and entropy are measured
        before the first step.
      input_rows: reference sets, stacked as `references`, whose inputs span the subspace where it
        is one of inputs.
      evaluations: held-out sets by name.
    """

    objective: Objective
    batches: Batches
    references: Sequence[HostBatch] = ()
    reference_rows: int = 0
    batches_per_refresh: int | None = None
    reference_loss: Objective | None = None
    in_step_batches: Batches | None = None
    reference_starts: Mapping[str, Evaluation] = field(default_factory=dict)
    input_rows: Sequence[HostBatch] = ()
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)


class Terminated(SystemExit):
    """SIGTERM was received and a checkpoint written; exit code 143."""


def fit(
    network: Network,
    workload: Workload,
    config: RunConfig,
    mesh: Mesh,
    run_dir: Path,
    progress: RunProgress | None = None,
) -> tuple[Network, list[Line]]:
    """Train `network`, resuming from the newest checkpoint in `run_dir` if there is one.

    Args:
      network: the model; its trained parameters are donated.
      workload: objective, data, references and held-out sets.
      config: the run's settings.
      mesh: the devices.
      run_dir: metrics and checkpoints are written here.
      progress: what a person sees, if it is shown already.

    Returns:
      The trained network, and all lines of the run's metrics.

    Raises:
      Terminated: after SIGTERM, with everything saved.
    """
    total = len(workload.batches)
    optimizer = make_optimizer(config, total)
    schedule = jax.jit(learning_rate(config.optimizer, total))
    train_step = make_train_step(
        network.graphdef,
        workload.objective,
        optimizer,
        reference_loss=None if workload.in_step_batches is None else workload.reference_loss,
    )
    evaluator = Evaluator(network, workload.evaluations, mesh)
    reference_evaluator = Evaluator(network, workload.reference_starts, mesh)
    refresh_step = None
    references: tuple[dict[str, jax.Array], ...] = ()
    if workload.references and workload.reference_loss is not None:
        refresh_step = make_refresh(
            network.graphdef,
            workload.reference_loss,
            project_momentum=config.ogpsa.project_momentum,
        )
        references = tuple(shard_rows(batches, mesh) for batches in workload.references)

    state = first_state(network.trained, optimizer, mesh, refreshes=refresh_step is not None)
    checkpoints = Checkpoints(run_dir / "checkpoints", config.train.keep_checkpoints)
    start, state = checkpoints.restore_newest(state) or (0, state)
    pending: list[tuple[int, dict[str, jax.Array], bool]] = []
    told: set[str] = set()

    def flush() -> None:
        lines: list[Line] = []
        for step, metrics, refreshed in pending:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            line: Line = {"step": step, "learning_rate": float(schedule(step - 1)), **values}
            if config.projects:
                line["refreshed"] = refreshed
            log.write(line)
            lines.append(line)
        pending.clear()
        log.flush()
        shown.add(lines)
        problems = find_problems(lines) | find_capped(lines, config.ogpsa)
        problems |= find_lost_updates(lines, config) | find_noise(log.lines, config)
        for kind, problem in problems.items():
            if kind not in told:
                logger.warning("%s", problem)
            told.add(kind)

    with (
        _Sigterm() as terminated,
        contextlib.closing(MetricsLog(run_dir, start)) as log,
        contextlib.nullcontext(progress) if progress else progress_of(config) as shown,
    ):
        shown.begin(total, start)
        if start == 0:
            if workload.evaluations or workload.reference_starts:
                shown.doing("compiling, and measuring before the first step")
            at_start = reference_evaluator.measure(state.params)
            evaluator.log(state.params, 0, log, at_start, rows=True)
            for problem in find_foreign_references(log.lines, config):
                logger.warning("%s", problem)
        if start == 0 and workload.input_rows:
            shown.doing("spanning the subspace with the references' inputs")
            make = make_input_subspace(
                network.graphdef,
                size=config.ogpsa.rank + _OVERSAMPLED,
                lora=config.model.lora is not None,
            )
            rows = tuple(shard_rows(batches, mesh) for batches in workload.input_rows)
            state = make(state, network.frozen, rows)
            if int(diagnostics(state.opt_state)["refused_refreshes"]):
                raise InputError(
                    "references.sets: what the model's layers make of these rows is not finite, so "
                    "no subspace can be spanned with it; look at the rows and the model's weights."
                )
        shown.doing("compiling the first step")
        for step in range(start, total):
            refreshed = False
            at_refresh: dict[str, jax.Array] = {}
            interval = config.ogpsa.refresh
            if refresh_step and interval and is_due(state, step, interval):
                number = refreshes_so_far(state)
                sets = in_turn(references, number, workload.batches_per_refresh)
                state, at_refresh = refresh_step(state, network.frozen, sets)
                if number == 0:  # of what there was before there is nothing to say
                    del at_refresh["reference/captured_fraction"], at_refresh["distance_moved"]
                refreshed = True
            batch = shard_rows(workload.batches.batch(step), mesh)
            if config.model.lora is not None and config.model.lora.dropout:
                key = jax.random.fold_in(jax.random.key(config.seed), step)
                # One a row, so that what is dropped depends neither on mesh nor on micro-batches.
                batch["dropout_keys"] = jax.random.split(key, batch["input_ids"].shape[:-1])
            reference_batch = rounding_key = None
            if config.optimizer.stochastic_rounding:
                rounding_key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
            if workload.in_step_batches is not None:
                refreshed = config.ogpsa.subspace == "gradients"
                reference_batch = shard_rows(workload.in_step_batches.batch(step), mesh)
            state, metrics = train_step(state, network.frozen, batch, reference_batch, rounding_key)
            done = step + 1
            if step == start:
                shown.doing("the first steps", say=False)
            pending.append((done, metrics | at_refresh, refreshed))
            evaluates = config.train.eval_every and done % config.train.eval_every == 0
            # Asked once a step: a signal that comes later than this belongs to the next step.
            stops = terminated(done)
            saves = done % config.train.save_every == 0 or done == total or stops
            if done % config.train.log_every == 0 or evaluates or saves:
                flush()
            if evaluates or done == total:
                shown.doing("measuring the held-out sets", say=False)
                evaluator.log(state.params, done, log, rows=done == total)
            if saves:
                log.flush()
                checkpoints.save(done, state)
            if stops and done < total:
                checkpoints.close()
                logger.warning(
                    "terminated: step %d of %d is saved; run again to go on", done, total
                )
                raise Terminated(143)
    checkpoints.close()
    return network._replace(trained=state.params), log.lines


def progress_of(config: RunConfig) -> RunProgress:
    """What a person sees of a run: a preference loss is counted in pairs."""
    return RunProgress(config.name, "pairs" if config.objective == "dpo" else "targets")


def is_due(state: TrainState, step: int, section: RefreshSection) -> bool:
    """Whether the basis is to be refreshed before 0-based `step`.

    By the distance, it is decided from the state alone, as a checkpoint holds it, so that a resumed
    run decides the same.
    """
    if section.every is not None:
        return step % section.every == 0
    moved = distance_moved(state.params, state.at_refresh)
    return refreshes_so_far(state) == 0 or float(moved) >= (section.distance or 0.0)


def refreshes_so_far(state: TrainState) -> int:
    """How often the basis was refreshed, refusals included, by its own counters."""
    basis = find_states(state.opt_state)[0]
    return int(basis.refreshes) + int(basis.refused_refreshes)


def in_turn(
    sets: Sequence[Mapping[str, Any]], number: int, count: int | None
) -> tuple[dict[str, Any], ...]:
    """The batches that refresh `number`, from 0, takes of each set: the next `count`, or all."""
    if count is None:
        return tuple(dict(batches) for batches in sets)
    taken = []
    for batches in sets:
        there = len(batches["input_ids"])
        chosen = (number * count + np.arange(min(count, there))) % there
        taken.append({name: array[chosen] for name, array in batches.items()})
    return tuple(taken)


class Evaluator:
    """Measures the held-out sets.

    Args:
      network: the model; its trained parameters may be others at each measurement.
      sets: the held-out sets by name.
      mesh: the devices.
    """

    def __init__(self, network: Network, sets: Mapping[str, Evaluation], mesh: Mesh) -> None:
        self._frozen = network.frozen
        self._sets = {
            name: (
                shard_rows(item.batches, mesh),
                make_evaluation(network.graphdef, item.objective, mesh),
            )
            for name, item in sets.items()
        }

    def log(
        self,
        params: Any,
        step: int,
        log: MetricsLog,
        further: Mapping[str, float] | None = None,
        *,
        rows: bool = False,
    ) -> None:
        """Write one line with all measures and `further` ones; none where there are none.

        With `rows`, also the loss and the weight of each row, by set.
        """
        measures, by_row = self._measure(params)
        line = {f"eval/{name}": value for name, value in measures.items()} | dict(further or {})
        if rows and by_row:
            log.write({"step": step, **line, "rows": by_row})
        elif line:
            log.write({"step": step, **line})

    def measure(self, params: Any) -> dict[str, float]:
        """``{set}/{measure}`` -> value with these trained parameters."""
        return self._measure(params)[0]

    def _measure(self, params: Any) -> tuple[dict[str, float], dict[str, Any]]:
        measures: dict[str, float] = {}
        rows: dict[str, Any] = {}
        for name, (batches, measure) in self._sets.items():
            count = len(next(iter(batches.values())))
            parts = [
                measure(params, self._frozen, {key: array[i] for key, array in batches.items()})
                for i in range(count)
            ]
            by_row = [
                [np.asarray(sums.pop(key)) for key in ("row_loss", "row_weight")]
                for _, _, sums in parts
                if "row_loss" in sums
            ]
            loss, weight, sums = jax.tree.map(lambda *xs: sum(float(x) for x in xs), *parts)
            measures[f"{name}/loss"] = loss / weight
            measures |= {f"{name}/{key}": value / weight for key, value in sums.items()}
            if by_row:
                losses, weights = (np.concatenate(arrays) for arrays in zip(*by_row, strict=True))
                full = weights > 0  # the last batch is filled up with empty rows
                rows[name] = {
                    "loss": [float(f"{x:.7g}") for x in losses[full].tolist()],
                    "weight": weights[full].tolist(),
                }
        return measures, rows


class _Sigterm:
    """While active, SIGTERM only sets a flag, so that the step under way is finished and saved.

    Of several processes some may get the signal earlier or alone; JAX's preemption service, which
    holds the signal's handler then, makes all of them agree on one step.
    """

    def __enter__(self) -> Callable[[int], bool]:
        self._received = False
        self._before: Any = None
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point
        # In another thread than the main one, whoever runs the main one handles signals.
        with contextlib.suppress(ValueError):
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return lambda step: self._received

    def _receive(self, *_: object) -> None:
        self._received = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
