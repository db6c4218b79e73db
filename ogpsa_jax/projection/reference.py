"""Reference gradients: the mean gradient of each reference set, at the memory of one gradient."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def reference_gradients(
    loss_fn: Callable[[Any, Any], Any], params: Any, sets: Sequence[Any]
) -> list[Any]:
    """One gradient per reference set. Jittable; sharded like the parameters.

    Args:
      loss_fn: ``(params, batch) -> loss``, a scalar; or ``-> (loss_sum, weight)``.
      params: the parameters.
      sets: one pytree of arrays per set, its batches stacked on the leading axis and scanned.

    Returns:
      Pytrees like `params`. With a scalar loss the mean over batches of each batch's gradient, as
      the official code takes it; with ``(loss_sum, weight)`` the gradient of
      ``Σ loss_sum / Σ weight``. Accumulated in float32, returned in the parameters' dtype.

    Raises:
      ValueError: a set without batches, one set where a list of them is expected, or a leaf of
        `params` that is not a floating-point array (as in an Equinox module): the message
        says how to leave it out.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ogpsa_jax import reference_gradients
      >>> def loss_fn(params, batch):
      ...     return jnp.mean(params * batch)
      >>> batches = jnp.array([[1.0, 3.0], [5.0, 7.0]])  # two batches of two rows
      >>> [float(g) for g in reference_gradients(loss_fn, jnp.array(0.0), [batches, batches[:1]])]
      [4.0, 2.0]
    """
    return losses_and_gradients(loss_fn, params, sets)[1]


def losses_and_gradients(
    loss_fn: Callable[[Any, Any], Any], params: Any, sets: Sequence[Any]
) -> tuple[list[jax.Array], list[Any]]:
    """As :func:`reference_gradients`, with the losses that are differentiated, float32 ``()``."""
    _check_arrays(params)

    def loss_and_weight(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        out = loss_fn(params, batch)
        loss, weight = out if isinstance(out, tuple) else (out, jnp.ones([], jnp.float32))
        return loss, jnp.asarray(weight, jnp.float32)

    loss_and_gradient = jax.value_and_grad(loss_and_weight, has_aux=True)

    def means(batches: Any) -> tuple[jax.Array, Any]:
        leaves = jax.tree.leaves(batches)
        if not leaves or leaves[0].shape[0] == 0:
            raise ValueError("sets: a reference set has no batch")

        def add(carry: Any, batch: Any) -> tuple[Any, None]:
            total, losses, weights = carry
            (loss, weight), grads = loss_and_gradient(params, batch)
            total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)
            return (total, losses + loss.astype(jnp.float32), weights + weight), None

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=jnp.float32), params)
        zero = jnp.zeros([], jnp.float32)
        (total, loss, weight), _ = jax.lax.scan(add, (zeros, zero, zero), batches)
        # An empty weight leaves a zero gradient, which adds no direction.
        scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
        return loss * scale, jax.tree.map(lambda t, p: (t * scale).astype(p.dtype), total, params)

    found = [means(batches) for batches in as_list(sets, "sets", "reference set")]
    return [loss for loss, _ in found], [gradient for _, gradient in found]


def as_list(items: Iterable[Any], name: str, what: str) -> list[Any]:
    """The items of a list that a caller might have forgotten to make.

    Raises:
      ValueError: a mapping instead of a list, or an empty list.
    """
    if isinstance(items, Mapping):
        raise ValueError(
            f"{name}: expected a list with one {what} or more, got one {type(items).__name__}; put "
            "it into a list"
        )
    found = list(items)
    if not found:
        raise ValueError(f"{name}: expected at least one {what}, got none")
    return found


def _check_arrays(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            continue
        what = f"a {type(leaf).__name__}" if dtype is None else f"an array of {dtype}"
        raise ValueError(
            f"params: {jax.tree_util.keystr(path) or 'the tree'} is {what}, and gradients are of "
            "floating-point arrays; give those alone and let loss_fn add the rest, as with "
            "arrays, rest = equinox.partition(model, equinox.is_inexact_array), and "
            "lambda arrays, batch: loss(equinox.combine(arrays, rest), batch)"
        )
