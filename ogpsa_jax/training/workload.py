"""From a run's examples to the loop's workload: objectives, batches, references, held-out sets."""

import dataclasses
from collections.abc import Sequence
from functools import partial

from jax.sharding import Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import SourceSection
from ogpsa_jax.data import Example, TrainBatches, fixed_batches
from ogpsa_jax.data.batches import HostBatch
from ogpsa_jax.errors import InputError
from ogpsa_jax.objectives.cross_entropy import surprise
from ogpsa_jax.objectives.distillation import distillation_loss
from ogpsa_jax.objectives.dpo import dpo_loss
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.evaluator import Evaluation
from ogpsa_jax.training.loop import Workload
from ogpsa_jax.training.mesh import row_shards, rows_per_micro_batch
from ogpsa_jax.training.prepare import RunData
from ogpsa_jax.training.refreshing import row_shares, spread_shape
from ogpsa_jax.training.step import Objective

_START_ROWS = 64  # of each reference set, on which the loss at the start is measured
_MOST_STEPS = 2**31 - 1  # the optimizer's counter is an int32


def prepare_workload(config: RunConfig, data: RunData, mesh: Mesh) -> Workload:
    """Objective, batches, references and held-out sets.

    Raises:
      InputError: the epochs come to no step, or to too many.
    """
    in_step_rows = config.reference_rows
    own_rows = config.train.batch_size - in_step_rows
    batches = _stream(config, mesh, data.train, config.data.train, own_rows, config.train.steps)
    _check_length(config, batches.rows, own_rows)
    spans_inputs = config.projects and config.ogpsa.subspace == "inputs"
    refreshes = not (spans_inputs or in_step_rows)
    return Workload(
        objective=preference_objective(config) if config.objective == "dpo" else _sft(config),
        batches=batches,
        references=_reference_sets(config, data) if refreshes else [],
        input_rows=_input_rows(config, mesh, data) if spans_inputs else [],
        reference_rows=in_step_rows or sum(len(examples) for examples in data.references),
        batches_per_refresh=_batches_per_refresh(config),
        reference_loss=_reference_loss(config),
        in_step_batches=_in_step_batches(config, mesh, data, len(batches)),
        reference_starts=_reference_starts(config, mesh, data),
        evaluations=_evaluations(config, mesh, data),
    )


def preference_objective(config: RunConfig, *, per_row: bool = False) -> Objective:
    """The configured preference loss."""
    return partial(
        dpo_loss,
        loss=config.dpo.loss,
        beta=config.dpo.beta,
        label_smoothing=config.dpo.label_smoothing,
        simpo_gamma=config.dpo.simpo_gamma,
        chunk_size=config.train.loss_chunk,
        per_row=per_row,
    )


def _sft(config: RunConfig, *, per_row: bool = False) -> Objective:
    return partial(sft_loss, chunk_size=config.train.loss_chunk, per_row=per_row)


def _reference_loss(config: RunConfig) -> Objective:
    if config.references.target == "initial":
        return partial(distillation_loss, chunk_size=config.train.loss_chunk)
    return preference_objective(config) if config.references.loss == "dpo" else _sft(config)


def _stream(
    config: RunConfig,
    mesh: Mesh,
    examples: list[Example],
    sources: Sequence[SourceSection],
    rows: int,
    steps: int | None,
) -> TrainBatches:
    """The batches of a run, with `rows` a step."""
    return TrainBatches(
        examples,
        batch_size=rows,
        micro_batch_size=rows_per_micro_batch(rows, config.train.micro_batch_size, mesh),
        max_length=config.data.max_length,
        packing=config.data.packing and len(examples[0].sequences) == 1,
        seed=config.seed,
        epochs=config.train.epochs,
        steps=steps,
        weights=[section.weight for section in sources],
    )


def _fixed(config: RunConfig, mesh: Mesh, examples: list[Example], batch_size: int) -> HostBatch:
    """All examples, in batches that the mesh can share."""
    return fixed_batches(
        examples,
        batch_size=batch_size,
        max_length=config.data.max_length,
        multiple=row_shards(mesh),
    )


def _reference_sets(config: RunConfig, data: RunData) -> list[HostBatch]:
    """The reference sets in the batches whose mean losses count, each row with its share."""
    found = []
    for examples in data.references:
        batches = fixed_batches(
            examples,
            batch_size=config.references.batch_size,
            max_length=config.data.max_length,
        )
        shares = row_shares(batches, pairs=config.references.loss == "dpo")
        found.append({**batches, "row_share": shares})
    return found


def _input_rows(config: RunConfig, mesh: Mesh, data: RunData) -> list[HostBatch]:
    """The reference sets in batches that keep every device busy: rows alone count, not batches."""
    most = config.train.micro_batch_size
    sizes = (spread_shape(len(examples), row_shards(mesh), most)[1] for examples in data.references)
    return [
        _fixed(config, mesh, examples, size)
        for examples, size in zip(data.references, sizes, strict=True)
    ]


def _check_length(config: RunConfig, rows: int, rows_per_step: int) -> None:
    """Refuse epochs that come to no step, or to more steps than an optimizer can count."""
    epochs = f"train.epochs: {config.train.epochs:g} passes over the data come to"
    if not rows:
        raise InputError(f"{epochs} no row at all; raise it, or set train.steps.")
    if rows > _MOST_STEPS * rows_per_step:
        raise InputError(
            f"{epochs} {rows / rows_per_step:.3g} steps, more than the {_MOST_STEPS} that an "
            "optimizer can count; lower it."
        )


def _batches_per_refresh(config: RunConfig) -> int | None:
    section = config.references
    if section.rows_per_refresh is None:
        return None
    return section.rows_per_refresh // (section.batch_size * len(section.sets))


def _in_step_batches(
    config: RunConfig, mesh: Mesh, data: RunData, steps: int
) -> TrainBatches | None:
    """The reference batch of every step, drawn from all sets; None where a run has none."""
    if not config.reference_rows:
        return None
    pool = [
        dataclasses.replace(example, source=number)
        for number, examples in enumerate(data.references)
        for example in examples
    ]
    return _stream(config, mesh, pool, config.references.sets, config.reference_rows, steps)


def _measured_rows(config: RunConfig, mesh: Mesh) -> int:
    """Rows of a batch that is only measured: those of a micro-batch of training."""
    rows = config.train.batch_size - config.reference_rows
    return rows_per_micro_batch(rows, config.train.micro_batch_size, mesh)


def _reference_starts(config: RunConfig, mesh: Mesh, data: RunData) -> dict[str, Evaluation]:
    """Some rows of the reference sets, where it is their answers that are trained on."""
    section, rows = config.references, _measured_rows(config, mesh)
    if not config.differentiates_references:
        return {}
    if section.loss == "dpo" or section.target != "answers":
        return {}
    measured = partial(surprise, chunk_size=config.train.loss_chunk)
    return {
        f"references.{number}": Evaluation(
            _fixed(config, mesh, examples[:_START_ROWS], rows), measured
        )
        for number, examples in enumerate(data.references)
    }


def _evaluations(config: RunConfig, mesh: Mesh, data: RunData) -> dict[str, Evaluation]:
    rows = _measured_rows(config, mesh)
    return {
        name: Evaluation(
            _fixed(config, mesh, examples, rows),
            preference_objective(config, per_row=True)
            if len(examples[0].sequences) == 2
            else _sft(config, per_row=True),
        )
        for name, examples in data.evaluations.items()
    }
