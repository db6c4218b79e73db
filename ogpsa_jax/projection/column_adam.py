r"""AdamW whose second moment is averaged over a kernel's input axes.

Adam divides every entry of a matrix by its own :math:`\sqrt{\nu}`, which mixes the columns of an
input-side subspace: a gradient that lies outside it makes a step that does not. With one
:math:`\nu` for each output, the mean over its inputs, the scaling is by a diagonal matrix from the
*right*, while the projection :math:`I - U U^\top` acts from the *left*: they commute. So projecting
the gradient alone is exact, and :math:`\nu` takes 1/in of its memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax.projection.groups import is_masked
from ogpsa_jax.projection.kernels import Kernels, find_kernels


class ScaleByColumnAdamState(NamedTuple):
    """State of :func:`scale_by_column_adam`."""

    count: jax.Array  # type: ignore[assignment]  # int32 [] (a tuple has a method of this name)
    mu: optax.Updates  # like the parameters
    nu: optax.Updates  # float32; of length 1 along the input axes of kernels


def scale_by_column_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, kernels: Kernels
) -> optax.GradientTransformation:
    """Adam with one second moment for each output of a kernel.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      kernels: which leaves are matrices; as for :func:`ogpsa_jax.ogpsa_project`. The others have a
        second moment for each entry, as in Adam.

    Returns:
      An ``optax.GradientTransformation``; its state is a :class:`ScaleByColumnAdamState`.

    Raises:
      ValueError: from ``init``: axes that a leaf does not have.
    """

    def axes(tree: Any) -> dict[int, tuple[int, ...]]:
        flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]
        if all(is_masked(leaf) for _, leaf in flat):
            return {}
        return {kernel.leaf: kernel.axes for kernel in find_kernels(flat, kernels)}

    def init_fn(params: optax.Params) -> ScaleByColumnAdamState:
        over = axes(params)
        leaves, treedef = jax.tree.flatten(params, is_leaf=is_masked)

        def zeros(place: int, leaf: Any) -> Any:
            if is_masked(leaf):
                return leaf
            # From the parameter, so that sharding carries over.
            squares = jnp.zeros_like(leaf, dtype=jnp.float32)
            return _mean(squares, over[place]) if place in over else squares

        nu = treedef.unflatten([zeros(place, leaf) for place, leaf in enumerate(leaves)])
        return ScaleByColumnAdamState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), nu)

    def update_fn(
        updates: optax.Updates, state: ScaleByColumnAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByColumnAdamState]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        # Where ν is shorter than the gradient, it is the mean over what is missing.
        nu = jax.tree.map(
            lambda g, v: b2 * v + (1 - b2) * _mean_like(jnp.square(g.astype(jnp.float32)), v),
            updates,
            state.nu,
        )
        count = optax.safe_increment(state.count)
        first, second = _correction(b1, count), _correction(b2, count)

        def scaled(m: jax.Array, v: jax.Array) -> jax.Array:
            step = (m.astype(jnp.float32) / first) / (jnp.sqrt(v / second) + eps)
            return step.astype(m.dtype)

        return jax.tree.map(scaled, mu, nu), ScaleByColumnAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def column_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    kernels: Kernels,
) -> optax.GradientTransformationExtraArgs:
    """AdamW that commutes with a projection on the inputs of kernels.

    With it ``chain(ogpsa_project(..., subspace="inputs"), column_adamw(...))`` keeps every step out
    of the subspace, and ``placement="both"`` is not needed. Weight decay shrinks the weights
    themselves, along the subspace too, whatever was projected before; hence 0 by default.

    Args:
      learning_rate: a number or a schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled.
      mask: which leaves decay; as for ``optax.adamw``.
      kernels: as for :func:`scale_by_column_adam`.

    Returns:
      The optimizer.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from ogpsa_jax import column_adamw, flax_kernels, ogpsa_project, refresh, second_moment
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> project = ogpsa_project(rank=1, subspace="inputs", kernels=flax_kernels)
      >>> tx = optax.chain(project, column_adamw(0.1, kernels=flax_kernels))
      >>> moments = {"kernel": second_moment(jnp.array([[0.0, 2.0]]))}
      >>> state = refresh(tx.init(params), moments=moments)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 3))}, state, params)
      >>> [round(float(x), 4) + 0.0 for x in updates["kernel"][:, 0]]  # the second input is kept
      [-0.1414, 0.0]
    """
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_column_adam(b1, b2, eps, kernels=kernels),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.mean(x, axis=axes, keepdims=True)


def _mean_like(x: jax.Array, shorter: jax.Array) -> jax.Array:
    axes = tuple(i for i, (a, b) in enumerate(zip(x.shape, shorter.shape, strict=True)) if a != b)
    return _mean(x, axes) if axes else x


def _correction(decay: float, count: jax.Array) -> jax.Array:
    """``1 − decay^count``, accurately in float32."""
    if decay == 0.0:
        return jnp.ones([], jnp.float32)
    return -jnp.expm1(count.astype(jnp.float32) * jnp.log(jnp.float32(decay)))
