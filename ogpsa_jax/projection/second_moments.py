"""Second moments of what layers multiply: what an input-side subspace is made from.

A matrix W ``[in, out]`` acts on inputs x. Where a change of W is orthogonal to every input of the
reference rows, no reference row notices it. :func:`input_moments` sums ``x xᵀ`` over those inputs
(a forward pass, no labels). :func:`gradient_moments` needs no access to the model: the gradient of
W is ``Σ x δᵀ``, so its columns lie in the span of the same inputs.

A wide layer keeps a sketch instead: ``Σ x (xᵀ Ω)`` with a Gaussian Ω ``[in, s]``, from which
:mod:`ogpsa_jax.projection.input_subspace` makes the Nyström approximation (Tropp et al. 2017,
arXiv 1706.05736). Nothing larger than ``[in, s]`` is ever held.

Source of the idea: GPM (arXiv 2103.09762), Adam-NSCL (arXiv 2103.07113), AlphaEdit
(arXiv 2410.02355).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.kernels import Kernels, as_matrices, find_kernels
from ogpsa_jax.projection.xla import let_compiler_place, matmul


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SecondMoment:
    """``A = Σ x xᵀ`` over inputs x, or a sketch of it. Moments of equal shapes are added by ``+``.

    Leading axes stand for layers. With a sketch, whatever is made from it states its error: the
    Nyström approximation never exceeds A, and lacks ``trace − (its own trace)`` of it in the
    nuclear norm.
    """

    product: jax.Array  # float32 [..., in, s]: A Ω; A itself without a sketch (s = in)
    trace: jax.Array  # float32 [...]: Σ ‖x‖², exactly
    seed: int | None = field(default=None, metadata={"static": True})  # of Ω; None: no sketch

    def __add__(self, other: "SecondMoment") -> "SecondMoment":
        return jax.tree.map(jnp.add, self, other)

    def test_matrix(self) -> jax.Array:
        """Ω, float32 ``[in, s]``."""
        width, size = self.product.shape[-2:]
        return _test_matrix(width, size, self.seed)


Moments = Mapping[str, SecondMoment]
"""The second moments of a model's layers, by the name of the input (see ``Kernel.inputs``)."""


def second_moment(
    inputs: jax.Array, mask: jax.Array | None = None, *, size: int | None = None, seed: int = 0
) -> SecondMoment:
    """The second moment of some inputs of a layer.

    Args:
      inputs: ``[..., in]``, any float dtype; all axes but the last are summed over.
      mask: bool ``[...]``, which of them count (padding does not); None: all.
      size: columns of a sketch, taken where it is smaller than ``in``; None: no sketch.
      seed: of the sketch; equal in all moments that are to be added.

    Returns:
      The moment, accumulated in float32.
    """
    width = inputs.shape[-1]
    sketch = seed if size is not None and size < width else None

    def moment(inputs: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        x_CxI = inputs.reshape(-1, width).astype(jnp.float32)
        if mask is not None:
            x_CxI = jnp.where(mask.reshape(-1, 1), x_CxI, 0.0)
        product = matmul(x_CxI.T, _sketched(x_CxI, size, sketch))
        return product, jnp.sum(jnp.square(x_CxI))

    product, trace = let_compiler_place(moment, (None, None), inputs, mask)
    return SecondMoment(product, trace, sketch)


def input_moments(
    collect: Callable[[Any, Any], Moments], params: Any, batches: Any
) -> dict[str, SecondMoment]:
    """Second moments of the inputs of layers over reference rows. Jittable; no labels needed.

    Args:
      collect: ``(params, batch) -> moments`` of one batch, by the names of ``Kernel.inputs``, each
        made by :func:`second_moment` (stacked along leading axes where layers are). The decoders
        of :mod:`ogpsa_jax.models` have ``input_moments``; for Flax Linen and NNX modules
        :mod:`ogpsa_jax.linen` and :mod:`ogpsa_jax.nnx` make such a function.
      params: the parameters.
      batches: a pytree of arrays, its batches stacked on the leading axis and scanned.

    Returns:
      The moments, summed over the batches.

    Raises:
      ValueError: no batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ogpsa_jax import input_moments, second_moment
      >>> def collect(params, batch):
      ...     return {"dense": second_moment(batch)}  # what params["kernel"] multiplies
      >>> rows = jnp.array([[[1.0, 0.0], [2.0, 0.0]]])  # one batch of two rows
      >>> input_moments(collect, {"kernel": jnp.eye(2)}, rows)["dense"].product.tolist()
      [[5.0, 0.0], [0.0, 0.0]]
    """
    return _summed(lambda batch: dict(collect(params, batch)), batches, "batch")


def gradient_moments(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    rows: Any,
    *,
    kernels: Kernels,
    size: int | None = None,
    seed: int = 0,
) -> dict[str, SecondMoment]:
    """Second moments of the columns of single rows' gradients. Jittable.

    For any training loop, without access to the inside of the model. Each row's gradient of each
    matrix, G ``[in, out]``, is scaled to norm 1 first (unscaled, the few rows with large gradients
    fill the sum), then ``Σ G Gᵀ`` is formed. The loss may take labels as given, or draw them from
    the model itself (then it is the Fisher information's column space, and no answers are needed).

    Args:
      loss_fn: ``(params, row) -> loss``, a scalar; what else a row needs (a PRNG key to draw a
        label with) is part of it.
      params: the parameters.
      rows: a pytree of arrays, single rows (or small batches) stacked on the leading axis: one
        gradient is taken for each, one after another.
      kernels: which leaves are matrices; as for :func:`ogpsa_jax.ogpsa_project`.
      size: columns of a sketch for wide layers; see :func:`second_moment`.
      seed: of the sketch.

    Returns:
      The moments, summed over rows, and over the kernels that share inputs.

    Raises:
      ValueError: no row, or no leaf that is a matrix.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ogpsa_jax import flax_kernels, gradient_moments
      >>> def loss_fn(params, x):
      ...     return jnp.sum(x @ params["kernel"])
      >>> rows = jnp.array([[3.0, 0.0], [0.0, 5.0]])
      >>> found = gradient_moments(loss_fn, {"kernel": jnp.eye(2)}, rows, kernels=flax_kernels)
      >>> found["kernel"].product.round(3).tolist()  # both rows weigh the same
      [[1.0, 0.0], [0.0, 1.0]]
    """
    matrices = find_kernels(jax.tree_util.tree_flatten_with_path(params)[0], kernels)
    gradient = jax.grad(loss_fn)

    def of_row(row: Any) -> dict[str, SecondMoment]:
        leaves = jax.tree.leaves(gradient(params, row))
        total: dict[str, SecondMoment] = {}
        for kernel in matrices:
            new = _columns(as_matrices(leaves[kernel.leaf], kernel), size, seed)
            name = kernel.inputs
            total[name] = total[name] + new if name in total else new
        return total

    return _summed(of_row, rows, "row")


def _columns(gradient: jax.Array, size: int | None, seed: int) -> SecondMoment:
    """Of the columns of matrices ``[..., in, out]``, each matrix scaled to norm 1."""
    g_IxO = gradient.astype(jnp.float32)
    peak = jnp.max(jnp.abs(g_IxO), axis=(-2, -1), keepdims=True)
    g_IxO = g_IxO / jnp.where(peak > 0, peak, 1.0)
    norm = jnp.sqrt(jnp.sum(jnp.square(g_IxO), axis=(-2, -1), keepdims=True))
    g_IxO = g_IxO / jnp.where(norm > 0, norm, 1.0)
    sketch = seed if size is not None and size < g_IxO.shape[-2] else None
    right_OxS = _sketched(jnp.swapaxes(g_IxO, -1, -2), size, sketch)
    trace = jnp.sum(jnp.square(g_IxO), axis=(-2, -1))
    return SecondMoment(matmul(g_IxO, right_OxS), trace, sketch)


def _sketched(rows: jax.Array, size: int | None, seed: int | None) -> jax.Array:
    """``rows Ω`` of rows ``[..., in]``; the rows themselves without a sketch."""
    if size is None or seed is None:
        return rows
    return matmul(rows, _test_matrix(rows.shape[-1], size, seed))


def _summed(
    moments: Callable[[Any], dict[str, SecondMoment]], batches: Any, what: str
) -> dict[str, SecondMoment]:
    leaves = jax.tree.leaves(batches)
    if not leaves or leaves[0].shape[0] == 0:
        raise ValueError(f"{what}es: there is no {what}" if what == "batch" else "rows: none given")
    shapes = jax.eval_shape(moments, jax.tree.map(lambda x: x[0], batches))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, moments(batch)), None

    return dict(jax.lax.scan(add, zeros, batches)[0])


def _test_matrix(width: int, size: int, seed: int | None) -> jax.Array:
    if seed is None:
        return jnp.eye(width, size, dtype=jnp.float32)
    return jax.random.normal(jax.random.key(seed), (width, size), jnp.float32)
