"""The compiled pieces of training: one optimizer step, one refresh, one evaluation batch.

The loss of a step is the sum over all its micro-batches divided by the sum of their weights
(target tokens, or pairs), whatever the cut; so is its gradient.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax import diagnostics, input_moments, project_parameters, refresh
from ogpsa_jax.objectives.cross_entropy import Batch
from ogpsa_jax.projection.diagnostics import captured_fraction, mean_cosine
from ogpsa_jax.projection.find import projects
from ogpsa_jax.projection.reference import losses_and_gradients
from ogpsa_jax.training.mesh import replicate_rest
from ogpsa_jax.training.offloading import (
    abstract_state,
    check_host_memory,
    fetched,
    in_host_memory,
    put_back,
)
from ogpsa_jax.training.optimizer import apply_updates, global_norm

Params = Any
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
    """What a step replaces: everything that a checkpoint must contain.

    `at_refresh` is a copy of the parameters as they were at the last refresh, to measure how far
    they have moved since; None where nothing is refreshed at intervals.
    """

    params: Params
    opt_state: Any
    at_refresh: Params | None = None


def first_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    refreshes: bool,
    offload: bool = False,
) -> TrainState:
    """The state before the first step.

    Args:
      params: the trained parameters.
      optimizer: of the run.
      mesh: the devices.
      refreshes: whether the basis is refreshed at intervals.
      offload: whether large arrays other than the parameters are in host memory.

    Raises:
      InputError: `offload`, and devices without pinned host memory.
    """
    if offload:
        check_host_memory(mesh)
        shapes = abstract_state(optimizer, params, mesh, offload=True)
        places = jax.tree.map(lambda shape: shape.sharding, shapes)
        opt_state = jax.jit(optimizer.init, out_shardings=places)(params)
    else:
        opt_state = replicate_rest(optimizer.init(params), mesh)
    if not refreshes:
        return TrainState(params, opt_state)
    like = jax.tree.map(in_host_memory, params) if offload else params
    where = jax.tree.map(lambda param: param.sharding, like)
    return TrainState(params, opt_state, jax.jit(_copied, out_shardings=where)(params))


@jax.jit
def distance_moved(params: Params, at_refresh: Params) -> jax.Array:
    """``‖θ − θ'‖ / ‖θ'‖`` with θ' the parameters at the last refresh; float32 ``()``."""
    now, then = (optax.tree.cast(tree, jnp.float32) for tree in (params, fetched(at_refresh)))
    whole = global_norm(then)
    return global_norm(optax.tree.sub(now, then)) / jnp.where(whole > 0, whole, 1.0)


def _copied(params: Params) -> Params:
    """The same in buffers of their own, so that both can be donated."""
    return jax.tree.map(jnp.copy, params)


def make_loss(graphdef: Any, objective: Objective) -> Callable[..., Any]:
    """``loss(params, frozen, batch) -> (sum, (weight, metrics))``."""

    def loss(params: Params, frozen: Params, batch: Batch) -> Any:
        total, weight, metrics = objective(nnx.merge(graphdef, params, frozen), batch)
        return total, (weight, metrics)

    return loss


def make_train_step(
    graphdef: Any,
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    reference_loss: Objective | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One optimizer step over a batch of [micro-batches, rows, ...]; the state is donated.

    Args:
      graphdef: the model's structure.
      objective: what is minimised.
      optimizer: projection, clipping and AdamW.
      reference_loss: what is differentiated on the reference rows of every batch, whose gradient
        the optimizer takes as ``reference``; None: a step takes no reference batch.

    Returns:
      ``step(state, frozen, batch[, reference_batch, rounding_key]) -> (state, metrics)``; metrics
      are float32 scalars on the device, those of the reference rows named ``reference/...``. With
      `rounding_key`, bfloat16 parameters are rounded at random.
    """
    mean_gradient = _mean_gradient(graphdef, objective)
    reference_gradient = None
    if reference_loss is not None:
        reference_gradient = _mean_gradient(graphdef, reference_loss)

    @partial(jax.jit, donate_argnums=0)
    def train_step(
        state: TrainState,
        frozen: Params,
        batch: Batch,
        reference_batch: Batch | None = None,
        rounding_key: jax.Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        params = state.params
        metrics: Metrics = {}
        extra_args: dict[str, Params] = {}
        if reference_gradient is not None:
            extra_args["reference"], sums = reference_gradient(params, frozen, reference_batch)
            metrics |= {f"reference/{name}": value for name, value in sums.items()}
        grads, sums = mean_gradient(params, frozen, batch)
        metrics |= {**sums, "grad_norm": global_norm(grads)}
        opt_state = fetched(state.opt_state, after=grads)
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra_args)
        metrics["update_norm"] = global_norm(updates)
        params, applied, share = apply_updates(params, updates, rounding_key)
        metrics |= {"applied_update_norm": applied, "applied_fraction": share}
        metrics |= projection_metrics(opt_state)
        opt_state = put_back(opt_state, state.opt_state)
        return state._replace(params=params, opt_state=opt_state), metrics

    return train_step


def _mean_gradient(graphdef: Any, objective: Objective) -> Callable[..., tuple[Params, Metrics]]:
    """``(params, frozen, batch) -> (gradient, metrics)`` of one step.

    The gradient of the sum of all micro-batches' losses over the sum of their weights, accumulated
    in float32, in the parameters' dtype.
    """
    value_and_grad = jax.value_and_grad(make_loss(graphdef, objective), has_aux=True)

    def mean_gradient(params: Params, frozen: Params, batch: Batch) -> tuple[Params, Metrics]:
        def add(sums: Any, micro_batch: Batch) -> tuple[Any, None]:
            (loss, (weight, metrics)), grads = value_and_grad(params, frozen, micro_batch)
            grads = optax.tree.cast(grads, jnp.float32)
            return jax.tree.map(jnp.add, sums, (grads, loss, weight, metrics)), None

        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(value_and_grad, params, frozen, first)
        (loss_shape, (weight_shape, metrics_shape)), _ = shapes
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (loss_shape, weight_shape, metrics_shape)
        )
        grads_zero = optax.tree.zeros_like(optax.tree.cast(params, jnp.float32))
        (grads, loss, weight, metrics), _ = jax.lax.scan(add, (grads_zero, *zeros), batch)
        scale = 1.0 / jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, params)
        means = {name: value * scale for name, value in metrics.items()}
        return grads, {**means, "loss": loss * scale, "weight": weight}

    return mean_gradient


def make_input_subspace(
    graphdef: Any, *, size: int, lora: bool
) -> Callable[[TrainState, Params, tuple[Batch, ...]], TrainState]:
    """Measure the inputs of the model's matrices on reference rows; span the subspace with them.

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
        opt_state = refresh(fetched(state.opt_state), moments=moments)
        params = project_parameters(opt_state, state.params) if lora else state.params
        return state._replace(params=params, opt_state=put_back(opt_state, state.opt_state))

    return make


def projection_metrics(opt_state: Any) -> Metrics:
    """The totals of :func:`ogpsa_jax.diagnostics`; empty without a projection."""
    if not projects(opt_state):
        return {}
    return {name: value for name, value in diagnostics(opt_state).items() if name != "groups"}


def make_refresh(
    graphdef: Any, reference_loss: Objective, *, project_momentum: bool
) -> Callable[[TrainState, Params, tuple[Batch, ...]], tuple[TrainState, Metrics]]:
    """Refresh the basis with the reference gradients at the present weights; state donated.

    The gradient of a set is the mean over its batches of the gradient of the batch's mean loss, as
    in the official code. How the rows of these batches are cut into micro-batches is free, for each
    row has its share in that mean.

    Args:
      graphdef: the model's structure.
      reference_loss: what is differentiated on reference rows; multiplies a row's loss by its
        ``row_share``.
      project_momentum: whether the first moments are projected with the new basis.

    Returns:
      ``refresh(state, frozen, reference_sets) -> (state, metrics)`` for sets as
      :func:`~ogpsa_jax.training.refreshing.spread_rows` makes them; metrics are float32 scalars:
      the loss of each set, ``references.0/loss`` and so on, and their mean ``reference/loss``; the
      mean ``reference/gradient_cosine`` of two sets' gradients; what the basis of before held of
      the gradients' squared norms, ``reference/captured_fraction``; and ``distance_moved``.
    """
    loss = make_loss(graphdef, reference_loss)

    @partial(jax.jit, donate_argnums=0)
    def refresh_step(
        state: TrainState, frozen: Params, reference_sets: tuple[Batch, ...]
    ) -> tuple[TrainState, Metrics]:
        def mean_loss(params: Params, batch: Batch) -> jax.Array:
            return loss(params, frozen, batch)[0]

        losses, gradients = losses_and_gradients(mean_loss, state.params, reference_sets)
        metrics = {f"references.{i}/loss": value for i, value in enumerate(losses)}
        metrics["reference/loss"] = jnp.mean(jnp.stack(losses))
        if len(gradients) > 1:
            metrics["reference/gradient_cosine"] = mean_cosine(gradients)
        before = fetched(state.opt_state)
        metrics["reference/captured_fraction"] = captured_fraction(before, gradients)
        if state.at_refresh is not None:
            metrics["distance_moved"] = distance_moved(state.params, state.at_refresh)
            copied = put_back(_copied(state.params), state.at_refresh)
            state = state._replace(at_refresh=copied)
        opt_state = refresh(before, gradients, project_momentum=project_momentum)
        return state._replace(opt_state=put_back(opt_state, state.opt_state)), metrics

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
