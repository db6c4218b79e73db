r"""The method on vectors: references → Gram matrix → eigenvectors → basis → projection.

For every group of leaves, with the references :math:`r_1 \dots r_M` as rows of a matrix:

1. divide each reference by its norm, :math:`u_i = r_i / \|r_i\|`;
2. eigen-decompose their Gram matrix, :math:`u_i^\top u_j`, and keep the `rank` largest eigenvalues
   :math:`\lambda`, of those above `rank_tol` times the largest;
3. the basis has the rows :math:`\lambda_k^{-1/2} \sum_i V_{ik} u_i`, orthonormalised once more, so
   that ``|QᵀQ − I| ≤ 1e-6`` in float32. Directions that are dropped are zero, because shapes must
   not depend on data;
4. a vector loses its component, :math:`g \leftarrow g - Q M Q^\top g`, :math:`M = (Q^\top Q)^{-1}`.

Source: paper (arXiv 2602.07892). The official code's Gram–Schmidt (``sft_pg/trainer.py``) divides
by the norm of whatever is left, round-off included. ``docs/core.md`` has the same in twenty lines
of NumPy.

Names end in the shapes of what they contain::

    G  groups; every layer of a stacked leaf counts for one
    L  the layers of one group: its rows among the G (1 where it stacks none)
    M  references
    K  directions of the basis: the rank
    N  entries of a group's leaves together

No array has an axis N, because joining leaves would gather what is sharded: `vector_N` is a flat
list of leaves, and `basis_KxN` a list of leaves that each have K in front, as an axis or a list.
Small matrices are arrays over all groups, so that one batched eigen-decomposition serves them all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection import xla
from ogpsa_jax.projection.groups import Group, reduced_axes, spread
from ogpsa_jax.projection.xla import Vectors, matmul

Leaves = Sequence[jax.Array]
RULES: tuple[str, ...] = ("orthogonal", "conflict", "inplane", "none")
TINY = 2.0**-112  # its inverse, over the root of the smallest `rank_tol`, is still a float32


class Span(NamedTuple):
    """A nearly orthonormal basis, and what is known of the references that it stands for.

    The basis is what it is made from: for :func:`orthonormalise`, some leaves at a time.
    """

    weights_GxMxK: jax.Array  # float32; zero where a direction is absent
    vectors_MxN: Sequence[Vectors]
    spectrum_GxK: jax.Array  # float32: energy of the unit references by direction
    mean_GxK: jax.Array  # float32: sum of the unit references, in the basis
    discarded_G: jax.Array  # float32: energy of the unit references outside the basis
    finite: jax.Array  # bool []: whether all references were


class Scaled(NamedTuple):
    """References divided by their largest entries, whose squares stay in float32's range."""

    references_MxN: list[jax.Array]  # float32: largest entry one in each group, or zero
    factors_GxM: jax.Array  # float32: what they were multiplied by
    gram_GxMxM: jax.Array  # float32
    inverse_norms_GxM: jax.Array  # float32; zero where a reference is
    finite: jax.Array  # bool []: whether all entries were


class Eigenpairs(NamedTuple):
    """The leading ones of Gram matrices."""

    weights_GxMxK: jax.Array  # float32: eigenvectors over root eigenvalues; zero if dropped
    spectrum_GxK: jax.Array  # float32: eigenvalues, largest first; zero if dropped
    discarded_G: jax.Array  # float32: sum of the other eigenvalues


class Subspaces(NamedTuple):
    """A basis as it is stored, to project with."""

    directions: Sequence[Leaves]  # K vectors, any float dtype
    metric_GxKxK: jax.Array  # float32: inverse of their Gram matrix
    mean_GxK: jax.Array  # float32: as in `Span`


class Energies(NamedTuple):
    """Squared norms, float32 ``[G]``."""

    before: jax.Array
    in_span: jax.Array  # of the component in the subspace, before the rule
    after: jax.Array


def span_of(
    references_MxN: Sequence[Leaves], groups: Sequence[Group], rank: int, rank_tol: float
) -> Span:
    """The subspace of references, given leaf by leaf as lists of M."""
    stacked_MxN = [
        jnp.stack([x.astype(jnp.float32) for x in references]) for references in references_MxN
    ]
    scaled = scale_references(stacked_MxN, groups)
    inverse_norms_GxM = scaled.inverse_norms_GxM
    gram_GxMxM = scaled.gram_GxMxM * inverse_norms_GxM[:, :, None] * inverse_norms_GxM[:, None, :]
    pairs = principal(gram_GxMxM, rank, rank_tol)
    # From the references as they came, so that nothing of their size outlives the Gram matrices.
    unit_factors_GxM = scaled.factors_GxM * inverse_norms_GxM
    weights_GxMxK = xla.scale_rows(unit_factors_GxM, pairs.weights_GxMxK)
    total_GxM = jnp.sum(gram_GxMxM, axis=-1)  # ⟨reference i, sum of the references⟩
    return Span(
        weights_GxMxK,
        references_MxN,
        pairs.spectrum_GxK,
        mean_GxK=jnp.sum(pairs.weights_GxMxK * total_GxM[:, :, None], axis=1),
        discarded_G=pairs.discarded_G,
        finite=scaled.finite,
    )


def scale_references(references_MxN: Leaves, groups: Sequence[Group]) -> Scaled:
    """Divide references by their largest entries, group by group."""
    scaled_MxN, peaks, factors = list(references_MxN), [], []
    count = references_MxN[0].shape[0]
    for group in groups:
        peak_MxL = jnp.zeros((count, group.length), jnp.float32)
        for leaf, axis in zip(group.of(references_MxN), group.axes, strict=True):
            entries = jnp.abs(leaf.astype(jnp.float32))
            largest = jnp.max(entries, axis=reduced_axes(leaf.ndim - 1, axis, 1), initial=0.0)
            peak_MxL = jnp.maximum(peak_MxL, largest.reshape(peak_MxL.shape))
        usable_MxL = jnp.isfinite(peak_MxL) & (peak_MxL >= TINY)
        peaks.append(peak_MxL)
        factor_MxL = jnp.where(usable_MxL, 1.0 / jnp.where(usable_MxL, peak_MxL, 1.0), 0.0)
        factors.append(factor_MxL.T)
        for place, axis in zip(group.leaves, group.axes, strict=True):
            leaf = references_MxN[place]
            factor = spread(factor_MxL, leaf.ndim - 1, axis)
            # Zero times infinity is not zero.
            scaled_MxN[place] = jnp.where(factor > 0, leaf.astype(jnp.float32) * factor, 0.0)
    gram_GxMxM = gram(scaled_MxN, groups)
    norms_squared_GxM = jnp.diagonal(gram_GxMxM, axis1=-2, axis2=-1)
    finite = jnp.all(jnp.isfinite(jnp.concatenate(peaks, axis=1)))
    return Scaled(
        scaled_MxN, jnp.concatenate(factors), gram_GxMxM, inverse_sqrt(norms_squared_GxM), finite
    )


def inverse_sqrt(values: jax.Array) -> jax.Array:
    """``values^(-1/2)``; zero where a value is not positive."""
    return jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1.0)), 0.0)


def gram(vectors_MxN: Leaves, groups: Sequence[Group]) -> jax.Array:
    """Gram matrices of stacked vectors: float32 ``[G, M, M]``.

    One reduction a leaf, and not one a pair: hundreds of leaves times M² pairs compile slowly.
    """
    count = groups[0].of(vectors_MxN)[0].shape[0]
    blocks = []
    for group in groups:
        total_LxMxM = jnp.zeros((group.length, count, count), jnp.float32)
        for leaf, axis in zip(group.of(vectors_MxN), group.axes, strict=True):
            entries = leaf.astype(jnp.float32)
            products = entries[:, None] * entries[None, :]
            sums = jnp.sum(products, axis=reduced_axes(leaf.ndim - 1, axis, 2))
            total_LxMxM = total_LxMxM + jnp.moveaxis(sums.reshape(count, count, -1), -1, 0)
        blocks.append(total_LxMxM)
    return jnp.concatenate(blocks)


def inner(a_N: Leaves, b_N: Leaves, groups: Sequence[Group]) -> jax.Array:
    """``⟨a, b⟩`` by group, accumulated in float32: ``[G]``."""
    totals = []
    for group in groups:
        total_L = jnp.zeros(group.length, jnp.float32)
        for place, axis in zip(group.leaves, group.axes, strict=True):
            total_L = total_L + xla.inner(a_N[place], b_N[place], axis)
        totals.append(total_L)
    return jnp.concatenate(totals)


def inner_with_each(
    vector_N: Leaves, directions: Sequence[Leaves], groups: Sequence[Group]
) -> jax.Array:
    """``⟨vector, direction k⟩`` by group: float32 ``[G, K]``."""
    totals = []
    for group in groups:
        total_LxK = jnp.zeros((group.length, len(directions)), jnp.float32)
        for place, axis in zip(group.leaves, group.axes, strict=True):
            each = [direction[place] for direction in directions]
            total_LxK = total_LxK + xla.inner_with_each(vector_N[place], each, axis)
        totals.append(total_LxK)
    return jnp.concatenate(totals)


def eigen(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, largest first, and eigenvectors (as columns) of symmetric ``[..., M, M]``."""
    values, vectors = jnp.linalg.eigh(matrices)
    return values[..., ::-1], vectors[..., ::-1]


def principal(gram_GxMxM: jax.Array, rank: int, rank_tol: float) -> Eigenpairs:
    """The `rank` leading eigenpairs, padded with zeros."""
    values_GxM, vectors_GxMxM = eigen(gram_GxMxM)
    missing = max(rank - values_GxM.shape[-1], 0)
    top_GxK = jnp.pad(values_GxM[:, :rank], [(0, 0), (0, missing)])
    keep_GxK = (top_GxK > rank_tol * top_GxK[:, :1]) & (top_GxK > 0)
    root_GxK = jnp.where(keep_GxK, jax.lax.rsqrt(jnp.where(keep_GxK, top_GxK, 1.0)), 0.0)
    spectrum_GxK = jnp.where(keep_GxK, top_GxK, 0.0)
    energy_G = jnp.sum(jnp.maximum(values_GxM, 0.0), axis=-1)
    vectors_GxMxK = jnp.pad(vectors_GxMxM[:, :, :rank], [(0, 0), (0, 0), (0, missing)])
    return Eigenpairs(
        vectors_GxMxK * root_GxK[:, None, :],
        spectrum_GxK,
        discarded_G=jnp.maximum(energy_G - jnp.sum(spectrum_GxK, axis=-1), 0.0),
    )


def combine(
    weights_GxMxK: jax.Array, vectors_MxN: Sequence[Vectors], groups: Sequence[Group]
) -> list[jax.Array]:
    """``basis[k] = Σ_m weights[:, m, k] · vectors[m]``: float32, stacked."""
    basis_KxN = [leaf[0] for leaf in vectors_MxN]
    for group in groups:
        for place, axis in zip(group.leaves, group.axes, strict=True):
            weights_LxMxK = weights_GxMxK[group.rows]
            basis_KxN[place] = xla.weighted_sums(weights_LxMxK, vectors_MxN[place], axis)
    return basis_KxN


def orthonormalise(
    weights_GxMxK: jax.Array, vectors_MxN: Sequence[Vectors], groups: Sequence[Group]
) -> dict[int, jax.Array]:
    """The closest orthonormal set to nearly orthonormal combinations of vectors.

    The first pass leaves errors of round-off over eigenvalue; a direction whose norm is off by half
    is nothing but that, and is dropped. Zero vectors stay zero.

    Args:
      weights_GxMxK: as :func:`combine` takes them.
      vectors_MxN: as :func:`combine` takes them.
      groups: some of all groups, which follow each other.

    Returns:
      Of the leaves of these groups, by place: float32, stacked with K in front.
    """
    out_KxN = {}
    first_KxN = combine(weights_GxMxK, vectors_MxN, groups)
    roots = xla.inverse_root(gram(first_KxN, groups))
    for group in groups:
        rows = slice(group.start - groups[0].start, group.rows.stop - groups[0].start)
        alone = group._replace(leaves=tuple(range(len(group.leaves))), start=0)
        vectors_KxN = combine(roots[rows], group.of(first_KxN), [alone])
        # Once more to norm one: the Gram matrix, whose entries XLA's CPU backend adds up one by
        # one, is 1e-6 off and more where all terms are positive. It adds up squares in blocks.
        factors_KxL = inverse_sqrt(_squared_norms(vectors_KxN, alone))
        for place, leaf, axis in zip(group.leaves, vectors_KxN, group.axes, strict=True):
            out_KxN[place] = leaf * spread(factors_KxL, leaf.ndim - 1, axis)
    return out_KxN


def _squared_norms(vectors_KxN: Leaves, group: Group) -> jax.Array:
    total_KxL = jnp.zeros((vectors_KxN[0].shape[0], group.length), jnp.float32)
    for leaf, axis in zip(vectors_KxN, group.axes, strict=True):
        squares = jnp.sum(jnp.square(leaf), axis=reduced_axes(leaf.ndim - 1, axis, 1))
        total_KxL = total_KxL + squares.reshape(total_KxL.shape)
    return total_KxL


def pseudo_inverse(gram_GxKxK: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """Inverse of Gram matrices ``[G, K, K]``, and their rank int32 ``[G]``.

    Directions whose eigenvalue is below `tolerance` times the largest count as absent.
    """
    values_GxK, vectors_GxKxK = eigen(gram_GxKxK)
    keep_GxK = (values_GxK > tolerance * values_GxK[:, :1]) & (values_GxK > 0)
    inverse_GxK = jnp.where(keep_GxK, 1.0 / jnp.where(keep_GxK, values_GxK, 1.0), 0.0)
    metric_GxKxK = matmul(
        vectors_GxKxK * inverse_GxK[:, None, :], jnp.swapaxes(vectors_GxKxK, -1, -2)
    )
    return metric_GxKxK, jnp.sum(keep_GxK, axis=-1, dtype=jnp.int32)


def project(
    vector_N: Leaves,
    subspaces: Subspaces,
    groups: Sequence[Group],
    rule: str,
    scale: Any,
    sign: float = 1.0,
) -> tuple[list[jax.Array], Energies]:
    """Apply `rule` to the component of a gradient or an update in its subspace.

    Args:
      vector_N: the leaves that the groups are of.
      subspaces: the bases.
      groups: how the leaves belong together.
      rule: one of `RULES`.
      scale: factor of the conflict rule where vector and references agree.
      sign: +1 for a gradient, −1 for an update (which points down its gradient).

    Returns:
      The leaves after the rule, in the dtypes of `vector_N`, and what it did. Coefficients are
      float32 whatever the dtypes.
    """
    # What is small is done for all groups at once: hundreds of them would compile slowly.
    norms_squared_G = inner(vector_N, vector_N, groups)
    coefficients_GxK = inner_with_each(vector_N, subspaces.directions, groups)
    energies, keep_G, take_GxK = _apply_rule(
        norms_squared_G, coefficients_GxK, subspaces, rule, scale, sign
    )
    out_N = list(vector_N)
    if rule == "none":
        return out_N, energies
    for group in groups:
        for place, axis in zip(group.leaves, group.axes, strict=True):
            leaf = vector_N[place]
            each = [direction[place] for direction in subspaces.directions]
            left = leaf.astype(jnp.float32)
            if rule != "orthogonal":
                left = left * spread(keep_G[group.rows], leaf.ndim, axis)
            taken = xla.weighted_sum(take_GxK[group.rows], each, axis)
            out_N[place] = (left - taken).astype(leaf.dtype)
    return out_N, energies


def _apply_rule(
    norms_squared_G: jax.Array,
    coefficients_GxK: jax.Array,
    subspaces: Subspaces,
    rule: str,
    scale: Any,
    sign: float,
) -> tuple[Energies, jax.Array, jax.Array]:
    """What the rule does, keeps of the vector ``[G]``, and takes of the basis ``[G, K]``."""
    metric_GxKxK, mean_GxK = subspaces.metric_GxKxK, subspaces.mean_GxK
    # An infinite gradient times a zero direction is not a number: absent directions have no weight.
    present_GxK = jnp.diagonal(metric_GxKxK, axis1=-2, axis2=-1) > 0
    there_GxK = jnp.where(present_GxK, coefficients_GxK, 0.0)
    component_GxK = matmul(metric_GxKxK, there_GxK[:, :, None])[:, :, 0]
    in_span_G = _sum_where(component_GxK, coefficients_GxK)
    one, zero = jnp.ones_like(norms_squared_G), jnp.zeros_like(norms_squared_G)
    keep_G, take_G = one, one
    if rule == "none":
        take_G = zero
    elif rule == "inplane":
        keep_G, take_G = zero, -one
    elif rule == "conflict":
        agreement_G = sign * _sum_where(mean_GxK, coefficients_GxK)
        keep_G = jnp.where(agreement_G > 0, jnp.asarray(scale, jnp.float32), one)
        take_G = jnp.where(agreement_G < 0, one, zero)
    after_G = keep_G**2 * (norms_squared_G - in_span_G) + (keep_G - take_G) ** 2 * in_span_G
    after_G = norms_squared_G if rule == "none" else jnp.maximum(after_G, 0.0)
    return (
        Energies(norms_squared_G, in_span_G, after_G),
        keep_G,
        take_G[:, None] * component_GxK,
    )


def _sum_where(weights_GxK: jax.Array, coefficients_GxK: jax.Array) -> jax.Array:
    """``Σ_k weights · coefficients``, where a weight of zero leaves out even what is not finite."""
    terms_GxK = jnp.where(weights_GxK != 0, coefficients_GxK * weights_GxK, 0.0)
    return jnp.sum(terms_GxK, axis=-1)
