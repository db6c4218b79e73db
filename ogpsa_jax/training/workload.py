"""From a run's examples to the loop's task: objectives, batches, references, held-out sets."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

from jax.sharding import Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import SourceSection
from ogpsa_jax.data import Example, TrainBatches, fixed_batches
from ogpsa_jax.errors import InputError
from ogpsa_jax.objectives.cross_entropy import surprise
from ogpsa_jax.objectives.distillation import distillation_loss
from ogpsa_jax.objectives.dpo import dpo_loss
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.evaluator import Evaluation
from ogpsa_jax.training.loop import Workload
from ogpsa_jax.training.mesh import row_shards, rows_per_micro_batch
from ogpsa_jax.training.prepare import RunData
from ogpsa_jax.training.step import Objective

_START_ROWS = 64  # of each reference set, on which the loss at the start is measured
_MOST_STEPS = 2**31 - 1  # the optimizer's counter is an int32


def prepare_workload(config: RunConfig, data: RunData, mesh: Mesh) -> Workload:
    """Objective, batches, references and held-out sets."""
    shards = row_shards(mesh)
    in_step_rows = config.reference_rows

    def micro_rows(batch_size: int) -> int:
        return rows_per_micro_batch(batch_size, config.train.micro_batch_size, mesh)

    def stream(
        examples: list[Example], sources: Sequence[SourceSection], rows: int, steps: int | None
    ) -> TrainBatches:
        return TrainBatches(
            examples,
            batch_size=rows,
            micro_batch_size=micro_rows(rows),
            max_length=config.data.max_length,
            packing=config.data.packing and len(examples[0].sequences) == 1,
            seed=config.seed,
            epochs=config.train.epochs,
            steps=steps,
            weights=[section.weight for section in sources],
        )

    def fixed(examples: list[Example], batch_size: int) -> Any:
        return fixed_batches(
            examples, batch_size=batch_size, max_length=config.data.max_length, multiple=shards
        )

    preference = preference_objective(config)
    cross_entropy = partial(sft_loss, chunk_size=config.train.loss_chunk)
    reference_loss: Objective = cross_entropy
    if config.references.target == "initial":
        reference_loss = partial(distillation_loss, chunk_size=config.train.loss_chunk)
    elif config.references.loss == "dpo":
        reference_loss = preference
    own_rows = config.train.batch_size - in_step_rows
    batches = stream(data.train, config.data.train, own_rows, config.train.steps)
    _check_length(config, batches.rows, own_rows)
    in_step_batches = None
    if in_step_rows:
        pool = [
            dataclasses.replace(example, source=number)
            for number, examples in enumerate(data.references)
            for example in examples
        ]
        in_step_batches = stream(pool, config.references.sets, in_step_rows, len(batches))
    inputs = config.projects and config.ogpsa.subspace == "inputs"
    sets = [
        fixed(examples, config.references.batch_size)
        for examples in data.references
        if inputs or not in_step_rows
    ]
    return Workload(
        objective=preference if config.objective == "dpo" else cross_entropy,
        batches=batches,
        references=[] if in_step_rows or inputs else sets,
        input_rows=sets if inputs else [],
        reference_rows=in_step_rows or sum(len(examples) for examples in data.references),
        batches_per_refresh=None
        if config.references.rows_per_refresh is None
        else config.references.rows_per_refresh
        // (config.references.batch_size * len(config.references.sets)),
        reference_loss=reference_loss,
        in_step_batches=in_step_batches,
        reference_starts={
            f"references.{number}": Evaluation(
                fixed(examples[:_START_ROWS], micro_rows(own_rows)),
                partial(surprise, chunk_size=config.train.loss_chunk),
            )
            for number, examples in enumerate(data.references)
            if config.differentiates_references
            and config.references.loss != "dpo"
            and config.references.target == "answers"
        },
        evaluations={
            name: Evaluation(
                fixed(examples, micro_rows(own_rows)),
                preference_objective(config, per_row=True)
                if len(examples[0].sequences) == 2
                else partial(cross_entropy, per_row=True),
            )
            for name, examples in data.evaluations.items()
        },
    )


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
