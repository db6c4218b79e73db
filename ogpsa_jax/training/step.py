"""The compiled pieces of training: one optimizer step, one refresh, one evaluation batch.

The loss of a step is the sum over all its micro-batches divided by the sum of their weights
(target tokens, or pairs), whatever the cut; so is its gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax import (
    InputState,
    OgpsaState,
    diagnostics,
    input_moments,
    project_parameters,
    push_reference,
    reference_gradients,
    refresh,
)
from ogpsa_jax.training.optimizer import Optimizer, apply_updates, global_norm

Params = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (model, batch) -> loss summed over its weight, the weight, further sums to report
Objective = Callable[[Any, Batch], tuple[jax.Array, jax.Array, Metrics]]


class Network(NamedTuple):
    """A model taken apart: structure, and the parameters that are trained or not.

    `trained` and `frozen` are nested dicts of arrays; `frozen` is empty in full fine-tuning.
    """

    graphdef: Any
    trained: Params
    frozen: Params

    @classmethod
    def of(cls, model: nnx.Module, trained: Any = nnx.Param) -> "Network":
        """Split `model` by an nnx filter that says which parameters are trained."""
        graphdef, chosen, rest = nnx.split(model, trained, ...)
        return cls(graphdef, nnx.to_pure_dict(chosen), nnx.to_pure_dict(rest))

    def model(self) -> Any:
        """The model put together again."""
        return nnx.merge(self.graphdef, self.trained, self.frozen)


class TrainState(NamedTuple):
    """What a step replaces: everything that a checkpoint must hold."""

    params: Params
    opt_state: Any


def make_loss(graphdef: Any, objective: Objective) -> Callable[..., Any]:
    """``loss(params, frozen, batch) -> (sum, (weight, metrics))``."""

    def loss(params: Params, frozen: Params, batch: Batch) -> Any:
        total, weight, metrics = objective(nnx.merge(graphdef, params, frozen), batch)
        return total, (weight, metrics)

    return loss


class InStep(NamedTuple):
    """References that ride in the training batch; see :class:`~.config.InStepSection`."""

    objective: Objective
    window: int | None  # None: the subspace is one of inputs, and no gradient goes into it
    replay_weight: float
    project_momentum: bool


def make_train_step(
    graphdef: Any,
    objective: Objective,
    optimizer: Optimizer,
    *,
    per_micro_batch: bool = False,
    in_step: InStep | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One optimizer step over a batch of [micro-batches, rows, ...]; the state is donated.

    With `in_step`, the gradient of the step's own reference rows first goes into the basis; the
    training gradient is projected with that basis, and `replay_weight` times the reference gradient
    is added to what remains. A subspace of inputs stays as it is, and takes its part of both
    gradients where the optimizer's step part projects.

    Args:
      graphdef: the model's structure.
      objective: what is minimised.
      optimizer: projection, clipping and AdamW.
      per_micro_batch: apply the optimizer's gradient part to the gradient of every micro-batch, as
        the official hooks do, instead of to their sum. The same for linear rules.
      in_step: what to do with reference rows.

    Returns:
      ``step(state, frozen, batch[, reference_batch, rounding_key]) -> (state, metrics)``; metrics
      are float32 scalars on the device, those of the reference rows named ``reference/...``. With
      `rounding_key`, bfloat16 parameters are rounded at random.
    """
    mean_gradient = _mean_gradient(graphdef, objective)
    reference_gradient = _mean_gradient(graphdef, in_step.objective) if in_step else None

    @partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState,
        frozen: Params,
        batch: Batch,
        reference_batch: Batch | None = None,
        rounding_key: jax.Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        params, opt_state = state
        metrics: Metrics = {}
        replayed = None
        if in_step is not None and reference_gradient is not None:
            reference, sums, _ = reference_gradient(params, frozen, reference_batch)
            metrics |= {f"reference/{name}": value for name, value in sums.items()}
            if in_step.window is not None:
                opt_state = push_reference(
                    opt_state,
                    reference,
                    window=in_step.window,
                    project_momentum=in_step.project_momentum,
                )
            if in_step.replay_weight:
                replayed = optax.tree.scale(in_step.replay_weight, reference)

        projection_state, step_state = opt_state
        update = optimizer.gradient_part.update
        grads, sums, projection_state = mean_gradient(
            params, frozen, batch, update if per_micro_batch else None, projection_state
        )
        metrics |= {**sums, "grad_norm": global_norm(grads)}
        if not per_micro_batch:
            grads, projection_state = update(grads, projection_state, params)
        if replayed is not None:
            grads = jax.tree.map(jnp.add, grads, replayed)
        updates, step_state = optimizer.step_part.update(grads, step_state, params)
        metrics["update_norm"] = global_norm(updates)
        params, applied, share = apply_updates(params, updates, rounding_key)
        metrics |= {"applied_update_norm": applied, "applied_fraction": share}
        opt_state = (projection_state, step_state)
        metrics |= projection_metrics(opt_state)
        return TrainState(params, opt_state), metrics

    return train_step


def _mean_gradient(graphdef: Any, objective: Objective) -> Callable[..., Any]:
    """``(params, frozen, batch, transform, state) -> (gradient, metrics, state)`` of one step.

    The gradient of the sum of all micro-batches' losses over the sum of their weights, accumulated
    in float32, in the parameters' dtype. `transform`, an update function with `state`, sees each
    micro-batch's gradient on the way; what the state says of the step is the sum over them.
    """
    value_and_grad = jax.value_and_grad(make_loss(graphdef, objective), has_aux=True)

    def mean_gradient(
        params: Params, frozen: Params, batch: Batch, transform: Any = None, state: Any = None
    ) -> tuple[Params, Metrics, Any]:
        def add(carry: Any, micro_batch: Batch) -> tuple[Any, None]:
            sums, state = carry
            (loss, (weight, metrics)), grads = value_and_grad(params, frozen, micro_batch)
            grads = optax.tree.cast(grads, jnp.float32)
            if transform is not None:
                grads, state = transform(grads, state, params)
            new = (grads, loss, weight, metrics, _energies(state))
            return (jax.tree.map(jnp.add, sums, new), state), None

        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(value_and_grad, params, frozen, first)
        (loss_shape, (weight_shape, metrics_shape)), _ = shapes
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (loss_shape, weight_shape, metrics_shape)
        )
        grads_zero = optax.tree.zeros_like(optax.tree.cast(params, jnp.float32))
        energies = jax.tree.map(jnp.zeros_like, _energies(state))
        carry = ((grads_zero, *zeros, energies), state)
        ((grads, loss, weight, metrics, energies), after), _ = jax.lax.scan(add, carry, batch)
        if transform is not None:
            state = _of_one_step(state, after, energies)
        scale = 1.0 / jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, params)
        means = {name: value * scale for name, value in metrics.items()}
        return grads, {**means, "loss": loss * scale, "weight": weight}, state

    return mean_gradient


def _energies(state: Any) -> list[tuple[jax.Array, ...]]:
    """What each projection in `state` measured at its last update; empty where there is none."""
    return [(ours.squared_norm, ours.in_span, ours.removed) for ours in _projections(state)]


def _of_one_step(before: Any, after: Any, energies: list[tuple[jax.Array, ...]]) -> Any:
    """The state `after` the updates of a step, counted as one that measured their sum."""
    sums = iter(zip(_projections(before), energies, strict=True))

    def change(node: Any) -> Any:
        if not isinstance(node, OgpsaState):
            return node
        first, (squared_norm, in_span, removed) = next(sums)
        return dataclasses.replace(
            node,
            squared_norm=squared_norm,
            in_span=in_span,
            removed=removed,
            steps_since_refresh=optax.safe_increment(first.steps_since_refresh),
        )

    return jax.tree.map(change, after, is_leaf=lambda node: isinstance(node, OgpsaState))


def _projections(opt_state: Any) -> list[OgpsaState]:
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, OgpsaState))
    return [node for node in nodes if isinstance(node, OgpsaState)]


def make_input_subspace(
    graphdef: Any, *, size: int, lora: bool
) -> Callable[[TrainState, Params, tuple[Batch, ...]], TrainState]:
    """Measure what the model's matrices multiply on reference rows, and span the subspace with it.

    One forward pass over batches of [batches, rows, ...], pairs or not; the state is donated.

    Args:
      graphdef: the model's structure.
      size: columns that the sketch of a wide layer keeps.
      lora: whether the trained parameters are adapters: their ``a`` then loses its part in the
        subspace first, so that nothing that ``b`` learns is seen by a reference input. The model
        stays as it is, for ``b`` is zero.
    """

    @partial(jax.jit, donate_argnums=0)
    def make(state: TrainState, frozen: Params, sets: tuple[Batch, ...]) -> TrainState:
        def collect(params: Params, batch: Batch) -> Any:
            model = nnx.merge(graphdef, params, frozen)
            keys = ("input_ids", "positions", "segment_ids")
            rows = [batch[key].reshape(-1, batch[key].shape[-1]) for key in keys]
            return model.input_moments(*rows, size=size)

        parts = [input_moments(collect, state.params, batches) for batches in sets]
        moments = jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *parts)
        opt_state = refresh(state.opt_state, moments=moments)
        params = project_parameters(opt_state, state.params) if lora else state.params
        return TrainState(params, opt_state)

    return make


def projection_metrics(opt_state: Any) -> Metrics:
    """The totals of :func:`ogpsa_jax.diagnostics`; nothing where nothing projects."""
    ours = (OgpsaState, InputState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, ours))
    if not any(isinstance(node, ours) for node in nodes):
        return {}
    return {name: value for name, value in diagnostics(opt_state).items() if name != "groups"}


def make_refresh(
    graphdef: Any, reference_loss: Objective, *, project_momentum: bool
) -> Callable[[TrainState, Params, tuple[Batch, ...]], TrainState]:
    """Span the basis anew with the reference gradients at the present weights; state donated.

    The gradient of a set is the mean over its batches of the gradient of the batch's mean loss, as
    in the official code.
    """
    loss = make_loss(graphdef, reference_loss)

    @partial(jax.jit, donate_argnums=0)
    def refresh_step(
        state: TrainState, frozen: Params, reference_sets: tuple[Batch, ...]
    ) -> TrainState:
        def mean_loss(params: Params, batch: Batch) -> jax.Array:
            total, (weight, _) = loss(params, frozen, batch)
            return total / jnp.maximum(weight, 1.0)

        references = reference_gradients(mean_loss, state.params, reference_sets)
        opt_state = refresh(state.opt_state, references, project_momentum=project_momentum)
        return TrainState(state.params, opt_state)

    return refresh_step


def make_evaluation(
    graphdef: Any, objective: Objective, mesh: Mesh
) -> Callable[[Params, Params, Batch], tuple[jax.Array, jax.Array, Metrics]]:
    """``evaluate(params, frozen, batch) -> (loss sum, weight, metrics)`` of one batch.

    Metrics are sums or, where the objective gives them, of each row; every process gets them all.
    """
    loss = make_loss(graphdef, objective)
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]

    @partial(jax.jit, out_shardings=everywhere)
    def evaluate(
        params: Params, frozen: Params, batch: Batch
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        total, (weight, metrics) = loss(params, frozen, batch)
        return total, weight, metrics

    return evaluate
