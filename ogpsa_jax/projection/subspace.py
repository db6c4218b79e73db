"""The orthonormal basis of the reference subspace, for all groups at once.

Unit-normalise the references, take their m×m Gram matrix, eigen-decompose it in float32, drop the
directions whose eigenvalue is below `rank_tol` times the largest, keep at most `rank`. A second
pass orthonormalises what the first left, so that ``|QᵀQ − I| ≤ 1e-6``. Dropped directions are zero
vectors: shapes never depend on data.

Source: paper (arXiv 2602.07892), the reference subspace. The official code's Gram–Schmidt
(``sft_pg/trainer.py``) divides by the norm of whatever is left, round-off included.

Vectors are flat lists of leaves; *stacked* vectors have a leading axis counting them. All small
matrices are per-group arrays: one batched eigen-decomposition serves all groups (one for each of
hundreds of groups would compile slowly), while big arrays are only touched leaf by leaf.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import Group, stacks

Leaves = Sequence[jax.Array]
_TINY = 2.0**-112  # its inverse, over the root of the smallest `rank_tol`, is still a float32


class Principal(NamedTuple):
    """The leading eigenpairs of Gram matrices, as weights that make unit vectors of the vectors."""

    vectors: jax.Array  # float32 [G, m, k]: eigenvectors over root eigenvalues; zero if dropped
    spectrum: jax.Array  # float32 [G, k]: eigenvalues, largest first; zero if dropped
    discarded: jax.Array  # float32 [G]: sum of the other eigenvalues


class Shrunk(NamedTuple):
    """Stacked vectors, made small enough that squares of their entries stay in float32's range."""

    vectors: list[jax.Array]  # float32: largest entry one, group by group; zero vectors zero
    scale: jax.Array  # float32 [G, m]: what made them so
    gram: jax.Array  # float32 [G, m, m]
    factors: jax.Array  # float32 [G, m]: what then makes unit vectors of them; zero where zero
    finite: jax.Array  # bool []: whether all entries were


def shrink(stacked: Leaves, groups: Sequence[Group]) -> Shrunk:
    """The first half of making unit vectors, the second half of which is `factors`."""
    vectors, peaks, scales = list(stacked), [], []
    for group in groups:
        peak = jnp.zeros((stacked[0].shape[0], group.rows.stop - group.start), jnp.float32)
        for leaf, axis in zip(group.of(stacked), group.axes, strict=True):
            others = tuple(i + 1 for i in range(leaf.ndim - 1) if i != axis)
            entries = jnp.abs(leaf.astype(jnp.float32))
            peak = jnp.maximum(peak, jnp.max(entries, axis=others, initial=0.0).reshape(peak.shape))
        usable = jnp.isfinite(peak) & (peak >= _TINY)
        peaks.append(peak)
        scale = jnp.where(usable, 1.0 / jnp.where(usable, peak, 1.0), 0.0)
        scales.append(scale.T)
        for place, leaf, axis in zip(group.leaves, group.of(stacked), group.axes, strict=True):
            factor = spread_each(scale, leaf, axis)
            # Zero times infinity is not zero.
            vectors[place] = jnp.where(factor > 0, leaf.astype(jnp.float32) * factor, 0.0)
    squares = gram(vectors, groups)
    finite = jnp.all(jnp.isfinite(jnp.concatenate(peaks, axis=1)))
    return Shrunk(vectors, jnp.concatenate(scales), squares, inverse_norms(squares), finite)


def inverse_norms(squares: jax.Array) -> jax.Array:
    """One over the norms in Gram matrices ``[G, m, m]``: ``[G, m]``; zero for zero vectors."""
    diagonal = jnp.diagonal(squares, axis1=-2, axis2=-1)
    return jnp.where(diagonal > 0, jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1.0)), 0.0)


def spread_each(rows: jax.Array, leaf: jax.Array, axis: int | None) -> jax.Array:
    """Numbers ``[m, rows]`` shaped to broadcast against a stacked leaf ``[m, ...]``."""
    rest = tuple(-1 if i == axis else 1 for i in range(leaf.ndim - 1))
    return rows.reshape(rows.shape[0], *rest)


def gram(stacked: Leaves, groups: Sequence[Group]) -> jax.Array:
    """Gram matrices of stacked vectors: float32 ``[G, m, m]``.

    One reduction a leaf, and not one a pair: hundreds of leaves times m² pairs compile slowly.
    """
    blocks = []
    for group in groups:
        count = stacked[0].shape[0]
        total = jnp.zeros((group.rows.stop - group.start, count, count))
        for leaf, axis in zip(group.of(stacked), group.axes, strict=True):
            others = tuple(i + 2 for i in range(leaf.ndim - 1) if i != axis)
            entries = leaf.astype(jnp.float32)
            sums = jnp.sum(entries[:, None] * entries[None, :], axis=others)
            total = total + jnp.moveaxis(sums.reshape(count, count, -1), -1, 0)
        blocks.append(total)
    return jnp.concatenate(blocks)


def squared_norms(stacked: Leaves, group: Group) -> jax.Array:
    """Squared norms of stacked vectors in one group: float32 ``[k, rows]``."""
    total = jnp.zeros((stacked[0].shape[0], group.rows.stop - group.start), jnp.float32)
    for leaf, axis in zip(stacked, group.axes, strict=True):
        others = tuple(i + 1 for i in range(leaf.ndim - 1) if i != axis)
        total = total + jnp.sum(jnp.square(leaf), axis=others).reshape(total.shape)
    return total


def combine(
    weights: jax.Array, vectors: Sequence[Leaves | jax.Array], groups: Sequence[Group]
) -> list[jax.Array]:
    """``out[j] = Σ_i weights[:, i, j] · vectors[i]``: float32, stacked.

    The vectors come leaf by leaf, each leaf stacked or as a list of m.
    """
    out = [leaf[0] for leaf in vectors]
    for group in groups:
        factors = jnp.moveaxis(weights[group.rows], 0, -1)  # [m, k, rows]
        for place, axis in zip(group.leaves, group.axes, strict=True):
            leaf = vectors[place]
            if axis is None and _stacks(leaf):
                out[place] = jax.lax.dot_general(
                    factors[:, :, 0],
                    _stack(leaf),
                    (((0,), (0,)), ((), ())),
                    precision=jax.lax.Precision.HIGHEST,
                )
            else:
                rest = tuple(-1 if i == axis else 1 for i in range(leaf[0].ndim))
                out[place] = _weighted_sum(factors.reshape(*factors.shape[:2], *rest), leaf)
    return out


def _weighted_sum(factors: jax.Array, leaf: Leaves | jax.Array) -> jax.Array:
    """``Σ_i factors[i, j] · leaf[i]``: float32 ``[k, ...]``.

    Term by term: of a product and a sum over it, XLA's CPU backend first writes the product, m·k
    copies of the leaf.
    """
    total = factors[0] * leaf[0][None].astype(jnp.float32)
    if _stacks(leaf):  # many terms, unrolled, would compile slowly
        stack = _stack(leaf)
        return jax.lax.fori_loop(
            1, len(leaf), lambda i, total: total + factors[i] * stack[i][None], total
        )
    for i in range(1, len(leaf)):
        total = total + factors[i] * leaf[i][None].astype(jnp.float32)
    return total


def _stacks(leaf: Leaves | jax.Array) -> bool:
    """Whether a leaf's vectors are used as one array: many that already are, or would be small."""
    return len(leaf) > 8 if isinstance(leaf, jax.Array) else stacks(leaf)


def _stack(leaf: Leaves | jax.Array) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return leaf.astype(jnp.float32)
    return jnp.stack([x.astype(jnp.float32) for x in leaf])


def as_stored(leaves: Leaves, dtypes: Sequence[jnp.dtype]) -> list[jax.Array]:
    """Round to the dtypes that the basis is stored in.

    Behind a barrier: where XLA sees that the rounded is widened again, it may leave both out, and
    the Gram matrix would be that of other vectors than those stored (it does so on GPUs).
    """
    rounded = [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    return [
        new if new.dtype == old.dtype else jax.lax.optimization_barrier(new)  # type: ignore[no-untyped-call]
        for new, old in zip(rounded, leaves, strict=True)
    ]


def eigen(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, largest first, and eigenvectors (as columns) of symmetric ``[G, m, m]``."""
    values, vectors = jnp.linalg.eigh(matrices)
    return values[..., ::-1], vectors[..., ::-1]


def pseudo_inverse(matrices: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """Inverse of Gram matrices ``[G, k, k]``, and their rank int32 ``[G]``.

    Directions whose eigenvalue is below `tolerance` times the largest count as absent.
    """
    values, vectors = eigen(matrices)
    keep = (values > tolerance * values[:, :1]) & (values > 0)
    inverse = jnp.where(keep, 1.0 / jnp.where(keep, values, 1.0), 0.0)
    result = multiply(vectors * inverse[:, None, :], jnp.swapaxes(vectors, -1, -2))
    return result, jnp.sum(keep, axis=-1, dtype=jnp.int32)


def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product in true float32 (accelerators round the factors unless told not to)."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def scale_rows(factors: jax.Array, matrices: jax.Array) -> jax.Array:
    """``diag(factors) · matrices`` for every group: ``[G, m]``, ``[G, m, k]``.

    As a matrix product, which XLA makes once. A plain product, and the eigen-decomposition's
    aftermath with it, it makes again in the kernel of every group that reads its rows.
    """
    diagonal = factors[:, :, None] * jnp.eye(factors.shape[1], dtype=jnp.float32)[None]
    return multiply(diagonal, matrices)


def principal(matrices: jax.Array, rank: int, rank_tol: float) -> Principal:
    """The `rank` leading eigenpairs of Gram matrices ``[G, m, m]``, padded with zeros."""
    values, vectors = eigen(matrices)
    missing = max(rank - values.shape[-1], 0)
    top = jnp.pad(values[:, :rank], [(0, 0), (0, missing)])
    keep = (top > rank_tol * top[:, :1]) & (top > 0)
    root = jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, top, 1.0)), 0.0)
    spectrum = jnp.where(keep, top, 0.0)
    energy = jnp.sum(jnp.maximum(values, 0.0), axis=-1)
    return Principal(
        vectors=jnp.pad(vectors[:, :, :rank], [(0, 0), (0, 0), (0, missing)]) * root[:, None, :],
        spectrum=spectrum,
        discarded=jnp.maximum(energy - jnp.sum(spectrum, axis=-1), 0.0),
    )


def orthonormalised(basis: Leaves, groups: Sequence[Group]) -> list[jax.Array]:
    """The closest orthonormal set to a nearly orthonormal one, zero vectors staying zero.

    The first pass leaves errors of round-off over eigenvalue; a direction whose norm is off by half
    is nothing but that, and is dropped.
    """
    out = list(basis)
    for batch in _batches(basis, groups):
        turn = inverse_root(gram(basis, batch))
        for group in batch:
            rows = slice(group.start - batch[0].start, group.rows.stop - batch[0].start)
            alone = group._replace(leaves=tuple(range(len(group.leaves))), start=0)
            own = combine(turn[rows], group.of(basis), [alone])
            # XLA's CPU backend adds up the entries of a Gram matrix one by one: 1e-6 off and more
            # where all terms are positive. A plain sum of squares it adds up in blocks.
            squares = squared_norms(own, alone)
            inverse = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
            for place, leaf, axis in zip(group.leaves, own, group.axes, strict=True):
                out[place] = leaf * spread_each(inverse, leaf, axis)
    return out


def _batches(vectors: Leaves, groups: Sequence[Group]) -> list[list[Group]]:
    """Neighbouring groups that are orthonormalised at a time.

    One loop for each of hundreds would compile slowly; all at once would hold the first pass's
    result for all. So as many as are together no larger than the largest.
    """
    sizes = [sum(leaf[0].size for leaf in group.of(vectors)) for group in groups]
    limit, held = max(*sizes, 2**24), 0
    batches: list[list[Group]] = []
    for group, size in zip(groups, sizes, strict=True):
        held += size
        if not batches or held > limit:
            batches, held = [*batches, []], size
        batches[-1].append(group)
    return batches


def inverse_root(matrices: jax.Array) -> jax.Array:
    """``A^(-1/2)`` of nearly unit matrices ``[G, k, k]``; zero rows where the diagonal is far off.

    Newton–Schulz: a few small products, where one eigen-decomposition for each group would take
    accelerators long to compile. Converges from the identity over any bound of the eigenvalues.
    """
    diagonal = jnp.diagonal(matrices, axis1=-2, axis2=-1)
    keep = (diagonal > 0.5) & (diagonal < 2.0)
    both = keep[:, None, :] & keep[:, :, None]
    identity = jnp.eye(matrices.shape[-1], dtype=jnp.float32)[None]
    filled = jnp.where(both, matrices, identity)
    bound = jnp.max(jnp.sum(jnp.abs(filled), axis=-1), axis=-1)[:, None, None]

    def improve(_: int, root: jax.Array) -> jax.Array:
        error = 1.5 * identity - 0.5 * multiply(root, multiply(filled, root))
        return multiply(root, error)

    root = jax.lax.fori_loop(0, 12, improve, identity * jax.lax.rsqrt(bound))
    return jnp.where(both, root, 0.0)
