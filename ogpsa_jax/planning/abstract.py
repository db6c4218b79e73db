"""The programs of a run, and the shapes of what they take: no weights, no data, no devices.

These are the functions that training calls, on shapes that lie on a mesh as the arrays will.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.config import RunConfig
from ogpsa_jax.models import param_shardings
from ogpsa_jax.objectives.cross_entropy import sequence_log_probs
from ogpsa_jax.objectives.distillation import distillation_loss
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.mesh import ROWS, row_shards, rows_per_micro_batch
from ogpsa_jax.training.offloading import abstract_state, in_host_memory
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.prepare import prepare_model, trained_parameters
from ogpsa_jax.training.refreshing import spread_shape
from ogpsa_jax.training.step import (
    Network,
    Objective,
    TrainState,
    make_evaluation,
    make_input_subspace,
    make_refresh,
    make_train_step,
)
from ogpsa_jax.training.workload import preference_objective

SKETCHED = 64  # columns of a wide layer's sketch beyond the rank, as in training
_ROWS = 200  # of a reference set that does not say how many
FEWEST_PREDICTIONS = 8  # of the initial model, where references.top_k leaves the number open


@dataclass(frozen=True)
class Program:
    """A compiled piece of training, not compiled yet.

    Attributes:
      call: the jitted function.
      args: the shapes, types and shardings of its arguments.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class AbstractRun:
    """A run of which only shapes are known."""

    config: RunConfig
    mesh: Mesh
    network: Network
    state: TrainState
    optimizer: optax.GradientTransformationExtraArgs

    def train_step(self) -> Program:
        """One optimizer step; with it the reference batch, where every step takes one."""
        config = self.config
        references = config.reference_rows
        step = make_train_step(
            self.network.graphdef,
            self._objective(),
            self.optimizer,
            reference_loss=self._reference_loss() if references else None,
        )
        pairs = config.objective == "dpo"
        batches = [self.batch(config.train.batch_size - references, pairs=pairs)]
        if references:
            distilled = config.references.target == "initial"
            batches.append(
                self.batch(references, pairs=self._reference_pairs(), distilled=distilled)
            )
        return Program(step, (self.state, self.network.frozen, *batches))

    def refresh(self) -> Program | None:
        """A refresh of the basis; None where it is not spanned by gradients at intervals."""
        config = self.config
        if not config.refreshes:
            return None
        step = make_refresh(
            self.network.graphdef,
            self._reference_loss(),
            project_momentum=config.ogpsa.project_momentum,
        )
        return Program(step, (self.state, self.network.frozen, self._reference_sets()))

    def span_inputs(self) -> Program | None:
        """The pass over the references that spans a subspace of inputs; None without one."""
        config = self.config
        if not config.projects or config.ogpsa.subspace != "inputs":
            return None
        make = make_input_subspace(
            self.network.graphdef,
            size=config.ogpsa.rank + SKETCHED,
            lora=config.model.lora is not None,
        )
        return Program(make, (self.state, self.network.frozen, self._reference_sets()))

    def evaluation(self) -> Program:
        """One batch of a held-out set."""
        return self._forward(self._objective())

    def reference_model_pass(self) -> Program | None:
        """One batch through the reference model of DPO; None where the loss takes none."""
        config = self.config
        if config.objective != "dpo" or config.dpo.reference_model == "none":
            return None

        def log_probs(model: Any, batch: Any) -> Any:
            found, counts = sequence_log_probs(model, batch, config.train.loss_chunk)
            return jnp.sum(found), jnp.sum(counts).astype(jnp.float32), {}

        return self._forward(log_probs)

    def predictions(self) -> int:
        """Bytes of the initial model's predictions on the references; 0 where there are none."""
        config = self.config
        if config.references.target != "initial":
            return 0
        rows = sum(section.samples or _ROWS for section in config.references.sets)
        kept = config.references.top_k or FEWEST_PREDICTIONS
        return rows * config.data.max_length * (8 * kept + 4)

    def batch(
        self, rows: int, *, pairs: bool, distilled: bool = False, most: int | None = None
    ) -> dict[str, Any]:
        """Shapes of a batch ``[micro-batches, rows, ...]``.

        Args:
          rows: of the whole batch.
          pairs: whether a row is a chosen and a rejected sequence.
          distilled: whether the initial model's predictions come with it.
          most: rows that a device processes at a time; by default ``train.micro_batch_size``.
        """
        config = self.config
        micro = rows_per_micro_batch(rows, most or config.train.micro_batch_size, self.mesh)
        lead = (rows // micro, micro)
        shape = (*lead, 2, config.data.max_length) if pairs else (*lead, config.data.max_length)
        tokens = ("input_ids", "segment_ids", "positions")
        arrays: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(tokens, (shape, jnp.int32))
        arrays["loss_mask"] = (shape, jnp.bool_)
        if pairs and config.dpo.reference_model != "none":
            arrays["reference_logps"] = ((*lead, 2), jnp.float32)
        if distilled:
            kept = (*shape, config.references.top_k or FEWEST_PREDICTIONS)
            arrays["teacher_ids"] = (kept, jnp.int32)
            arrays["teacher_log_probs"] = (kept, jnp.float32)
            arrays["teacher_rest"] = (shape, jnp.float32)
        if config.model.lora is not None and config.model.lora.dropout:
            keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), lead))
            arrays["dropout_keys"] = (lead, keys.dtype)
        sharding = NamedSharding(self.mesh, PartitionSpec(None, ROWS))  # type: ignore[no-untyped-call]
        return {name: _shaped(size, dtype, sharding) for name, (size, dtype) in arrays.items()}

    def _forward(self, objective: Objective) -> Program:
        config = self.config
        call = make_evaluation(self.network.graphdef, objective, self.mesh)
        rows = row_shards(self.mesh) * config.train.micro_batch_size
        batch = self.batch(rows, pairs=config.objective == "dpo")
        one = jax.tree.map(_without_first_axis, batch)
        return Program(call, (self.state.params, self.network.frozen, one))

    def _reference_sets(self) -> tuple[dict[str, Any], ...]:
        section = self.config.references
        turn = (section.rows_per_refresh or 0) // len(section.sets)
        return tuple(self._reference_set(turn or s.samples or _ROWS) for s in section.sets)

    def _reference_set(self, count: int) -> dict[str, Any]:
        """As its rows are spread over the shards for a refresh, or for the span of inputs."""
        section = self.config.references
        shards, most = row_shards(self.mesh), self.config.train.micro_batch_size
        micro_batches, rows = spread_shape(count, shards, most)
        batch = self.batch(
            micro_batches * rows,
            pairs=self._reference_pairs(),
            most=rows // shards,
            distilled=section.target == "initial" and self.config.refreshes,
        )
        if self.config.refreshes:
            like = batch["loss_mask"]
            lead = NamedSharding(self.mesh, PartitionSpec(None, ROWS))  # type: ignore[no-untyped-call]
            batch["row_share"] = _shaped(like.shape[:2], jnp.float32, lead)
        return batch

    def _reference_pairs(self) -> bool:
        return self.config.references.loss in ("dpo", "official")

    def _objective(self) -> Objective:
        if self.config.objective == "dpo":
            return preference_objective(self.config)
        return partial(sft_loss, chunk_size=self.config.train.loss_chunk)

    def _reference_loss(self) -> Objective:
        chunk = self.config.train.loss_chunk
        if self.config.references.target == "initial":
            return partial(distillation_loss, chunk_size=chunk)
        if self.config.references.loss == "dpo":
            return preference_objective(self.config)
        return partial(sft_loss, chunk_size=chunk)


def abstract_run(
    config: RunConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
) -> AbstractRun:
    """Shapes of a run's model and state, lying on the mesh as the arrays will.

    Args:
      config: the run's settings; of ``model.path`` only ``config.json`` is read.
      mesh: of any devices, described ones too.
      optimizer: by default the one that the configuration makes.

    Raises:
      InputError: no such model, or one that the decoder does not cover.
    """
    section = config.model.model_copy(update={"initial_weights": "random"})
    drawn = config.model_copy(update={"model": section})
    model = nnx.eval_shape(functools.partial(prepare_model, drawn, mesh))
    network = Network.of(model, trained_parameters(config))
    where = Network.of(param_shardings_of(model, mesh), trained_parameters(config))
    trained, frozen = (
        jax.tree.map(_placed, shapes, shardings)
        for shapes, shardings in (
            (network.trained, where.trained),
            (network.frozen, where.frozen),
        )
    )
    tx = optimizer or make_optimizer(config, total_steps=100)
    state = TrainState(trained, abstract_state(tx, trained, mesh, offload=config.ogpsa.offload))
    if config.refreshes:
        copied = jax.tree.map(in_host_memory, trained) if config.ogpsa.offload else trained
        state = state._replace(at_refresh=copied)
    return AbstractRun(config, mesh, network._replace(trained=trained, frozen=frozen), state, tx)


def param_shardings_of(model: Any, mesh: Mesh) -> Any:
    """The model with a sharding in place of every parameter."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, param_shardings(state, mesh, model.placement.rules))


def _shaped(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _placed(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return _shaped(shape.shape, shape.dtype, sharding)


def _without_first_axis(shape: Any) -> jax.ShapeDtypeStruct:
    mesh, spec = shape.sharding.mesh, PartitionSpec(*shape.sharding.spec[1:])  # type: ignore[no-untyped-call]
    return _shaped(shape.shape[1:], shape.dtype, NamedSharding(mesh, spec))
