"""What the projection does in a certain way only because of how XLA compiles it.

The maths is in :mod:`ogpsa_jax.projection.subspace` and calls these functions by what they compute.
Each says which compiler needs it, and what was measured without it. On a compiler that does not,
the plain expression in its first line would do.

Letters of shapes are those of :mod:`ogpsa_jax.projection.subspace`. The vectors of a *leaf* come as
one array with a leading axis that counts them, or as a list of arrays.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from ogpsa_jax.projection.groups import Group, reduced_axes, spread

Vectors = Sequence[jax.Array] | jax.Array

_WHOLE = PartitionSpec()  # type: ignore[no-untyped-call]


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in true float32.

    TPUs and GPUs round the factors to bfloat16 or TF32 unless asked not to.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def scale_rows(factors_GxM: jax.Array, matrices_GxMxK: jax.Array) -> jax.Array:
    """``factors[:, :, None] * matrices``, as a product with a diagonal matrix.

    All backends. XLA computes a matrix product once. It fuses an elementwise product, together with
    whatever follows the eigen-decomposition, into the kernel of every group that reads its rows: 61
    KB of LLVM code for each, where 11 KB remain (CPU). With `batches`, a refresh of 339 leaves
    compiles in 41 s, and without both in 99 s.
    """
    diagonal_GxMxM = (
        factors_GxM[:, :, None] * jnp.eye(factors_GxM.shape[1], dtype=jnp.float32)[None]
    )
    return matmul(diagonal_GxMxM, matrices_GxMxK)


def inverse_root(matrices_GxKxK: jax.Array) -> jax.Array:
    """``A^(-1/2)`` of nearly unit matrices; rows whose diagonal is far from one are zero.

    Accelerators: their compilers take long over an eigen-decomposition, and there would be one for
    each batch of groups. Newton–Schulz needs a few small products, and converges from the identity
    over any bound of the eigenvalues.
    """
    diagonal_GxK = jnp.diagonal(matrices_GxKxK, axis1=-2, axis2=-1)
    keep_GxK = (diagonal_GxK > 0.5) & (diagonal_GxK < 2.0)
    both_GxKxK = keep_GxK[:, None, :] & keep_GxK[:, :, None]
    identity = jnp.eye(matrices_GxKxK.shape[-1], dtype=jnp.float32)[None]
    filled_GxKxK = jnp.where(both_GxKxK, matrices_GxKxK, identity)
    bound = jnp.max(jnp.sum(jnp.abs(filled_GxKxK), axis=-1), axis=-1)[:, None, None]

    def improve(_: int, root_GxKxK: jax.Array) -> jax.Array:
        error = 1.5 * identity - 0.5 * matmul(root_GxKxK, matmul(filled_GxKxK, root_GxKxK))
        return matmul(root_GxKxK, error)

    root_GxKxK = jax.lax.fori_loop(0, 12, improve, identity * jax.lax.rsqrt(bound))
    return jnp.where(both_GxKxK, root_GxKxK, 0.0)


def batches(vectors: Sequence[Vectors], groups: Sequence[Group]) -> list[list[Group]]:
    """``[groups]``, cut into runs of neighbours that are no larger than the largest group.

    All backends. One program for each of hundreds of groups compiles slowly (see `scale_rows`), and
    needs more collectives: 490 all-reduces in a refresh of 339 leaves, where 55 remain. One program
    for all groups would contain the intermediate vectors of all of them.
    """
    sizes = [sum(leaf[0].size for leaf in group.of(vectors)) for group in groups]
    limit, total = max(*sizes, 2**24), 0
    cut: list[list[Group]] = []
    for group, size in zip(groups, sizes, strict=True):
        total += size
        if not cut or total > limit:
            cut, total = [*cut, []], size
        cut[-1].append(group)
    return cut


def one_after_another(done: Any, arrays: Any) -> tuple[Any, Any]:
    """Both as they are, the second not used before the first is computed.

    All backends. Left to itself, XLA makes the intermediate vectors of all batches of groups before
    it stores a basis, which are larger than it. On TPUs, a refresh at rank 4 held 8.5 copies of the
    parameters.
    """
    both: tuple[Any, Any] = jax.lax.optimization_barrier((done, arrays))  # type: ignore[no-untyped-call]
    return both


def round_to(leaf: jax.Array, dtype: Any) -> jax.Array:
    """``leaf.astype(dtype)``, behind a barrier.

    GPUs: where XLA sees that the rounded values are widened again, it leaves out both conversions,
    and the Gram matrix is that of other vectors than those stored. On an H200, what the projection
    left along a bfloat16 basis was 3e-5, and is 1e-8 with the barrier.
    """
    rounded = leaf.astype(dtype)
    if rounded.dtype == leaf.dtype:
        return rounded
    return jax.lax.optimization_barrier(rounded)  # type: ignore[no-untyped-call]


def widen(leaf: jax.Array) -> jax.Array:
    """``leaf.astype(float32)``, of bfloat16 by its bits, the upper half of the same float32's.

    CPU: XLA merges a second conversion with the first and keeps the float32 array in between, one
    copy of the parameters for each direction. On one core with 50 million parameters and a bfloat16
    basis of rank 4, the projection added 669 ms, and adds 141 this way.
    """
    if leaf.dtype != jnp.bfloat16:
        return leaf.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << jnp.uint32(16), jnp.float32)


def inner_with_each(leaf: jax.Array, vectors: Sequence[jax.Array], axis: int | None) -> jax.Array:
    """``[⟨leaf, v⟩ for v in vectors]``: float32 ``[L, K]``.

    By products and sums, see `inner`; many small vectors as one array, see `are_stacked`.
    """
    if not are_stacked(vectors):
        return jnp.stack([inner(leaf, vector, axis) for vector in vectors], axis=-1)
    stack = jnp.stack(vectors).astype(jnp.float32)
    products = leaf.astype(jnp.float32)[None] * stack
    return jnp.sum(products, axis=reduced_axes(leaf.ndim, axis, 1)).reshape(len(vectors), -1).T


def inner(a: jax.Array, b: jax.Array, axis: int | None) -> jax.Array:
    """``vdot(a, b)``, for each layer along `axis`: float32 ``[L]``.

    Partitioned programs: to contract a sharded dimension with a dot, XLA gathers the operands, and
    on meshes with explicit axes JAX refuses. The sum of products is one all-reduce of L numbers.
    """
    products = a.astype(jnp.float32) * b.astype(jnp.float32)
    return jnp.sum(products, axis=reduced_axes(a.ndim, axis)).reshape(-1)


def weighted_sum(
    weights_LxK: jax.Array, vectors: Sequence[jax.Array], axis: int | None
) -> jax.Array:
    """``Σ_k weights[:, k] · vectors[k]`` of one leaf: float32 ``[...]``.

    Many small vectors as one array, see `are_stacked`; others by `widen`.
    """
    ndim = vectors[0].ndim
    if are_stacked(vectors):
        stack = jnp.stack(vectors).astype(jnp.float32)
        return jnp.sum(spread(weights_LxK.T, ndim, axis) * stack, axis=0)
    terms = [spread(weights_LxK[:, k], ndim, axis) * widen(v) for k, v in enumerate(vectors)]
    return functools.reduce(jnp.add, terms)


def weighted_sums(weights_LxMxK: jax.Array, vectors: Vectors, axis: int | None) -> jax.Array:
    """``Σ_m weights[:, m, k] · vectors[m]`` of one leaf: float32 ``[K, ...]``.

    CPU: of a product and a sum over it, XLA first writes the product, M·K copies of the leaf. So
    the terms are added one by one; a push at rank 4 held 20 copies of the parameters more. Many
    terms, written out, would compile slowly: they are one matrix product, or a loop where layers
    differ.
    """
    weights_MxKxL = jnp.moveaxis(weights_LxMxK, 0, -1)
    stacked = are_stacked(vectors)
    if axis is None and stacked:
        return jax.lax.dot_general(
            weights_MxKxL[:, :, 0],
            _stack(vectors),
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
    factors = spread(weights_MxKxL, vectors[0].ndim, axis)
    total = factors[0] * vectors[0][None].astype(jnp.float32)
    if stacked:
        stack = _stack(vectors)
        return jax.lax.fori_loop(
            1, len(vectors), lambda i, total: total + factors[i] * stack[i][None], total
        )
    for i in range(1, len(vectors)):
        total = total + factors[i] * vectors[i][None].astype(jnp.float32)
    return total


def are_stacked(vectors: Vectors) -> bool:
    """Whether the vectors of a leaf are used as one array: more than eight, if that copies little.

    All backends. An operation on each, times hundreds of small leaves, compiles slowly: 300 leaves
    at rank 16 took 77 processor seconds for an update, and take 20. Of large leaves the copy costs
    more than it saves: a push at rank 8 held 13 copies of the parameters, and 9 without it.
    """
    if isinstance(vectors, jax.Array):
        return len(vectors) > 8
    return len(vectors) > 8 and vectors[0].size <= 2**17


def _stack(vectors: Vectors) -> jax.Array:
    if isinstance(vectors, jax.Array):
        return vectors.astype(jnp.float32)
    return jnp.stack([vector.astype(jnp.float32) for vector in vectors])


def let_compiler_place(fn: Callable[..., Any], like: Any, *args: Any) -> Any:
    """``fn(*args)``, where the compiler decides how matrix products sum over sharded axes.

    Meshes with explicit axes, on which JAX asks of every product where its result is to lie.

    Args:
      fn: a function of arrays.
      like: a tree shaped like its result: arrays, which the result's arrays are to lie like, or
        None for those that are to be whole on every device.
      *args: pytrees of arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return fn(*args)

    def spec(leaf: Any) -> PartitionSpec:
        return _WHOLE if leaf is None else jax.typeof(leaf).sharding.spec

    out = jax.tree.map(spec, like, is_leaf=lambda leaf: leaf is None)
    return jax.sharding.auto_axes(fn, out_sharding=out)(*args)
