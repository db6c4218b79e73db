"""The orthonormal basis of the reference subspace of one group.

Unit-normalise the references, take their m×m Gram matrix, eigen-decompose it in float32, drop the
directions whose eigenvalue is below `rank_tol` times the largest, keep at most `rank`. A second
pass orthonormalises what is left, so that ``|QᵀQ − I| ≤ 1e-6``. Dropped directions are zero
vectors: shapes never depend on data.

Source: paper (arXiv 2602.07892), the reference subspace; the official code's Gram–Schmidt
(``sft_pg/trainer.py``) divides by the norm of whatever is left, round-off included.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import Group, spread

# A vector of a group: its leaves in order. Several vectors stacked: each leaf gets a leading axis.
Vector = Sequence[jax.Array]


class Subspace(NamedTuple):
    """An orthonormal basis of one group and what the references look like in it."""

    basis: list[jax.Array]  # each leaf stacked: float32 [rank, ...]
    used: jax.Array  # int32 group.shape: directions that are not zero
    spectrum: jax.Array  # float32 group.shape + (rank,): eigenvalues, largest first
    mean: jax.Array  # float32 group.shape + (rank,): sum of the unit references, in the basis


def scaled(factor: jax.Array, vector: Vector, group: Group) -> list[jax.Array]:
    """`vector` times a per-group factor, in float32."""
    return [
        leaf.astype(jnp.float32) * spread(factor, leaf, axis)
        for leaf, axis in zip(vector, group.axes, strict=True)
    ]


def unit(vector: Vector, group: Group) -> tuple[list[jax.Array], jax.Array]:
    """`vector` with norm one, or zero if it is zero; float32, safe from over- and underflow.

    Returns:
      The unit vector, and whether it was finite (bool ``group.shape``); zero where it was not.
    """
    largest = jnp.zeros(group.shape, jnp.float32)
    for leaf, axis in zip(vector, group.axes, strict=True):
        others = tuple(i for i in range(leaf.ndim) if i != axis)
        entries = jnp.abs(leaf.astype(jnp.float32))
        largest = jnp.maximum(largest, jnp.max(entries, axis=others, initial=0.0))
    finite = jnp.isfinite(largest)
    usable = finite & (largest > 0)
    # Two steps, the first by the largest entry: squares of 1e-30 or 1e30 would leave float32.
    first = scaled(jnp.where(usable, 1.0 / jnp.where(usable, largest, 1.0), 0.0), vector, group)
    first = [
        jnp.where(spread(usable, leaf, axis), leaf, 0.0)
        for leaf, axis in zip(first, group.axes, strict=True)
    ]
    square = squared_norm(first, group)
    norm = jax.lax.rsqrt(jnp.where(usable, square, 1.0))
    return scaled(norm, first, group), finite


def squared_norm(vector: Vector, group: Group) -> jax.Array:
    """‖vector‖², float32 ``group.shape``."""
    total = jnp.zeros(group.shape, jnp.float32)
    for leaf, axis in zip(vector, group.axes, strict=True):
        others = tuple(i for i in range(leaf.ndim) if i != axis)
        total = total + jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=others)
    return total


def gram(stacked: Vector, group: Group) -> jax.Array:
    """Gram matrix of stacked vectors: float32 ``group.shape + (m, m)``.

    One reduction a leaf (and not one a pair: m² of them compile slowly), as a product and a sum,
    which costs a sharded leaf one all-reduce of m² numbers and never an all-gather.
    """
    count = stacked[0].shape[0]
    total = jnp.zeros((count, count, *group.shape), jnp.float32)
    for leaf, axis in zip(stacked, group.axes, strict=True):
        products = leaf[:, None] * leaf[None, :]
        others = tuple(i + 2 for i in range(leaf.ndim - 1) if i != axis)
        total = total + jnp.sum(products, axis=others)
    return jnp.moveaxis(total, (0, 1), (-2, -1))


def combine(weights: jax.Array, stacked: Vector, group: Group) -> list[jax.Array]:
    """``out[j] = Σ_i weights[..., i, j] · stacked[i]`` for every j, each leaf stacked anew."""
    out = []
    weights = jnp.moveaxis(weights, (-2, -1), (0, 1))  # [m, k, *group.shape]
    for leaf, axis in zip(stacked, group.axes, strict=True):
        rest = leaf.ndim - 1
        shape = tuple(-1 if i == axis else 1 for i in range(rest))
        factors = weights.reshape(*weights.shape[:2], *(shape if axis is not None else (1,) * rest))
        out.append(jnp.sum(leaf[:, None] * factors, axis=0))
    return out


def inverse_root(values: jax.Array, keep: jax.Array) -> jax.Array:
    """``values ** -0.5`` where kept, else zero."""
    return jnp.where(keep, jax.lax.rsqrt(jnp.where(keep, values, 1.0)), 0.0)


def span(stacked: Vector, group: Group, rank: int, rank_tol: float) -> Subspace:
    """The principal directions of vectors that are unit (or weighted) already.

    Args:
      stacked: each leaf float32 ``[m, ...]``.
      group: how the leaves belong together.
      rank: directions kept at most.
      rank_tol: smallest eigenvalue kept, relative to the largest.
    """
    count = stacked[0].shape[0]
    kept = min(rank, count)
    products = gram(stacked, group)
    values, vectors = jnp.linalg.eigh(products)
    values = values[..., ::-1][..., :kept]
    vectors = vectors[..., ::-1][..., :kept]
    keep = (values > rank_tol * values[..., :1]) & (values > 0)
    coefficients = vectors * inverse_root(values, keep)[..., None, :]
    # Second pass: the first leaves errors of round-off / sqrt(eigenvalue); the polar factor of a
    # nearly orthonormal set is its closest orthonormal set.
    basis = combine(coefficients, stacked, group)
    for _ in range(2):
        again, turn = jnp.linalg.eigh(gram(basis, group))
        root = inverse_root(again, again > 0.25)
        polar = jnp.matmul(
            turn * root[..., None, :], jnp.swapaxes(turn, -1, -2), precision="highest"
        )
        basis = combine(polar, basis, group)
    sums = jnp.sum(coordinates(basis, stacked, group), axis=-1)
    missing = rank - kept
    pad = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
    return Subspace(
        basis=[jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1)) for leaf in basis],
        used=jnp.sum(keep, axis=-1, dtype=jnp.int32),
        spectrum=jnp.pad(jnp.where(keep, values, 0.0), pad),
        mean=jnp.pad(sums, pad),
    )


def coordinates(basis: Vector, stacked: Vector, group: Group) -> jax.Array:
    """``⟨basis[j], stacked[i]⟩``: float32 ``group.shape + (k, m)``."""
    total = jnp.zeros((basis[0].shape[0], stacked[0].shape[0], *group.shape), jnp.float32)
    for a, b, axis in zip(basis, stacked, group.axes, strict=True):
        others = tuple(i + 2 for i in range(a.ndim - 1) if i != axis)
        total = total + jnp.sum(a[:, None] * b[None, :], axis=others)
    return jnp.moveaxis(total, (0, 1), (-2, -1))


def metric(stored: Vector, group: Group) -> jax.Array:
    """``(QᵀQ)⁻¹`` of the basis as stored, zero for zero directions: float32 ``(…, k, k)``.

    A basis kept in bfloat16 is not orthonormal to better than 1e-2; with this metric
    ``Q M Qᵀ`` is still the exact projector onto what it spans.
    """
    products = gram([leaf.astype(jnp.float32) for leaf in stored], group)
    present = jnp.diagonal(products, axis1=-2, axis2=-1) > 0
    identity = jnp.eye(products.shape[-1], dtype=jnp.float32)
    filled = jnp.where(present[..., None, :] & present[..., :, None], products, identity)
    inverse = jnp.linalg.inv(filled)
    inverse = 0.5 * (inverse + jnp.swapaxes(inverse, -1, -2))
    return jnp.where(present[..., None, :] & present[..., :, None], inverse, 0.0)
