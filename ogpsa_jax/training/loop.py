"""The training loop: refresh, step, evaluate, log, save; exact resume after a kill at any instant.

Nothing here reads files of models or data: see :mod:`ogpsa_jax.training.run` for that.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh

from ogpsa_jax import diagnostics
from ogpsa_jax.config import RunConfig
from ogpsa_jax.data.batches import HostBatch
from ogpsa_jax.errors import InputError
from ogpsa_jax.objectives.cross_entropy import Batch
from ogpsa_jax.runs import RunDir
from ogpsa_jax.training.checkpoints import Checkpoints
from ogpsa_jax.training.evaluator import Evaluation, Evaluator
from ogpsa_jax.training.hooks import Hooks
from ogpsa_jax.training.mesh import shard_rows
from ogpsa_jax.training.metrics import Line
from ogpsa_jax.training.monitor import Monitor
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.preemption import SigtermFlag, Terminated
from ogpsa_jax.training.progress import RunProgress
from ogpsa_jax.training.refreshing import refresh_when_due
from ogpsa_jax.training.speed import Profiler, SpeedMeter
from ogpsa_jax.training.step import (
    Metrics,
    Network,
    Objective,
    TrainState,
    first_state,
    make_input_subspace,
    make_train_step,
)

logger = logging.getLogger(__name__)
_OVERSAMPLED = 64  # columns of a wide layer's sketch beyond the rank


class Batches(Protocol):
    """Training data by step: the same step always gives the same batch."""

    def __len__(self) -> int:
        """Optimizer steps in total."""

    def batch(self, step: int) -> HostBatch:
        """Arrays [micro-batches, rows, ...] of 0-based `step`."""


@dataclass(frozen=True)
class Workload:
    """What is trained, on what, against what.

    Attributes:
      objective: what is minimised.
      batches: the training rows of every step.
      references: reference sets, each stacked as [batches, rows, ...], with each row's share in
        its batch's mean; their gradients span the basis at every refresh.
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


def fit(
    network: Network,
    workload: Workload,
    config: RunConfig,
    mesh: Mesh,
    run_dir: Path,
    progress: RunProgress | None = None,
    hooks: Hooks | None = None,
) -> tuple[Network, list[Line]]:
    """Train `network`, resuming from the newest checkpoint in `run_dir` if there is one.

    Args:
      network: the model; its trained parameters are donated.
      workload: objective, data, references and held-out sets.
      config: the run's settings.
      mesh: the devices.
      run_dir: metrics and checkpoints are written here.
      progress: what a person sees, if it is shown already.
      hooks: told of each step and evaluation.

    Returns:
      The trained network, and all lines of the run's metrics.

    Raises:
      Terminated: after SIGTERM, with everything saved.
      HookError: after a hook has failed, with everything saved.
    """
    total = len(workload.batches)
    optimizer = make_optimizer(config, total)
    in_step_loss = None if workload.in_step_batches is None else workload.reference_loss
    train_step = make_train_step(
        network.graphdef, workload.objective, optimizer, reference_loss=in_step_loss
    )
    files = RunDir(run_dir)
    meter = SpeedMeter(
        files.speed,
        network.model().config,
        half=config.model.dtype != "float32",
        frozen=config.model.lora is not None,
    )
    refreshed = _refresh_of(network, workload, config, mesh, meter)
    evaluator = Evaluator(network, workload.evaluations, mesh)

    state = first_state(
        network.trained,
        optimizer,
        mesh,
        refreshes=config.refreshes,
        offload=config.ogpsa.offload,
    )
    checkpoints = Checkpoints(run_dir / "checkpoints", config.train.keep_checkpoints)
    start, state = checkpoints.restore_newest(state) or (0, state)
    with (
        SigtermFlag() as terminated,
        Monitor(config, run_dir, start, total, progress, hooks or Hooks()) as monitor,
        contextlib.closing(Profiler(files.profile, config.train.profile)) as profiler,
    ):
        if start == 0:
            files.speed.unlink(missing_ok=True)
            _measure_start(state, network, workload, mesh, evaluator, monitor)
            state = _span_inputs(state, network, workload, config, mesh, monitor)
        monitor.doing("compiling the first step")
        for step in range(start, total):
            done = step + 1
            profiler.before(done, state)
            state, at_refresh = refreshed(state, step)
            inputs = _step_inputs(step, workload, config, mesh, meter)
            state, metrics = train_step(state, network.frozen, *inputs)
            monitor.add_step(done, metrics | at_refresh)
            profiler.after(done, metrics)
            if step == start:
                jax.block_until_ready(metrics)  # type: ignore[no-untyped-call]
                meter.restart()
                monitor.doing("the first steps", say=False)
            # Asked once a step: a signal that comes later than this belongs to the next step.
            stops = terminated(done) or monitor.hooks.failed
            saves = _is_multiple(done, config.train.save_every) or done == total or stops
            evaluates = _is_multiple(done, config.train.eval_every) or done == total
            if _is_multiple(done, config.train.log_every) or evaluates or saves:
                monitor.flush(meter)
            if evaluates:
                monitor.doing("measuring the held-out sets", say=False)
                measures, rows = evaluator.measure_rows(state.params)
                monitor.add_evaluation(done, measures, rows if done == total else None)
            if saves:
                checkpoints.save(done, state)
            if evaluates or saves:
                meter.restart()
            if stops and done < total:
                checkpoints.close()
                monitor.hooks.raise_failure(done)
                logger.warning(
                    "terminated: step %d of %d is saved; run again to go on", done, total
                )
                raise Terminated(143)
        checkpoints.close()
        monitor.hooks.raise_failure(total)
    return network._replace(trained=state.params), monitor.lines


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _refresh_of(
    network: Network, workload: Workload, config: RunConfig, mesh: Mesh, meter: SpeedMeter
) -> Callable[[TrainState, int], tuple[TrainState, Metrics]]:
    """The run's :func:`refresh_when_due`; nothing is ever due where it has no such interval."""
    loss, section = workload.reference_loss, config.ogpsa.refresh
    if not config.projects or loss is None or section is None:
        return lambda state, step: (state, {})
    return refresh_when_due(
        network,
        workload.references,
        loss,
        section,
        mesh,
        project_momentum=config.ogpsa.project_momentum,
        batches_per_refresh=workload.batches_per_refresh,
        micro_batch_size=config.train.micro_batch_size,
        aside=meter.excluded,
    )


def _measure_start(
    state: TrainState,
    network: Network,
    workload: Workload,
    mesh: Mesh,
    evaluator: Evaluator,
    monitor: Monitor,
) -> None:
    """Log the held-out sets and the reference sets as they are before the first step."""
    if workload.evaluations or workload.reference_starts:
        monitor.doing("compiling, and measuring before the first step")
    references = Evaluator(network, workload.reference_starts, mesh).measure(state.params)
    measures, rows = evaluator.measure_rows(state.params)
    monitor.add_evaluation(0, measures, rows, references)


def _span_inputs(
    state: TrainState,
    network: Network,
    workload: Workload,
    config: RunConfig,
    mesh: Mesh,
    monitor: Monitor,
) -> TrainState:
    """Span a subspace of inputs with the reference rows; nothing where the run has no such rows."""
    if not workload.input_rows:
        return state
    monitor.doing("spanning the subspace with the references' inputs")
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
    return state


def _step_inputs(
    step: int, workload: Workload, config: RunConfig, mesh: Mesh, meter: SpeedMeter
) -> tuple[Batch, Batch | None, jax.Array | None]:
    """Batch, reference batch and rounding key of 0-based `step`: a function of seed and step."""
    with meter.waiting():
        rows = workload.batches.batch(step)
        batch, reference_batch = shard_rows(rows, mesh), None
        meter.add(rows)
        if workload.in_step_batches is not None:
            rows = workload.in_step_batches.batch(step)
            reference_batch = shard_rows(rows, mesh)
            meter.add_tokens(rows)
    if config.model.lora is not None and config.model.lora.dropout:
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        # One a row, so that what is dropped depends neither on mesh nor on micro-batches.
        batch["dropout_keys"] = jax.random.split(key, batch["input_ids"].shape[:-1])
    rounding_key = None
    if config.optimizer.stochastic_rounding:
        rounding_key = jax.random.fold_in(jax.random.key(config.seed + 1), step)
    return batch, reference_batch, rounding_key
