"""What happens to the component of a vector that lies in the reference subspace of its group.

``P v = Q M Qᵀ v`` with ``M = (QᵀQ)⁻¹``; coefficients in float32, the result in the vector's dtype.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import Group, combination, inner, inner_with_each, spread
from ogpsa_jax.projection.subspace import multiply

RULES: tuple[str, ...] = ("orthogonal", "conflict", "inplane", "none")


class Subspaces(NamedTuple):
    """What spans the reference subspace of every group."""

    directions: Sequence[Sequence[jax.Array]]  # k flat lists of the held leaves, any float dtype
    metric: jax.Array  # float32 [G, k, k]
    mean: jax.Array  # float32 [G, k]: the sum of the unit references, in the basis


class Energies(NamedTuple):
    """Squared norms, float32 ``[G]``."""

    before: jax.Array
    in_span: jax.Array  # of the component in the subspace, before the rule
    after: jax.Array


def project(
    vector: Sequence[jax.Array],
    subspaces: Subspaces,
    groups: Sequence[Group],
    rule: str,
    scale: Any,
    sign: float = 1.0,
) -> tuple[list[jax.Array], Energies]:
    """Apply `rule` to a gradient or an update.

    Args:
      vector: the held leaves.
      subspaces: the bases.
      groups: how the leaves belong together.
      rule: one of `RULES`.
      scale: factor of the conflict rule where vector and references agree.
      sign: +1 for a gradient, −1 for an update (which points down its gradient).

    Returns:
      The leaves after the rule, in the dtypes of `vector`, and what it did.
    """
    basis = [[direction[i] for direction in subspaces.directions] for i in range(len(vector))]
    before, coefficients = [], []
    for group in groups:
        own = group.of(vector)
        before.append(inner(own, own, group))
        coefficients.append(inner_with_each(own, group.of(basis), group))
    # What is small is done for all groups at once: hundreds of them would compile slowly.
    energies, keep, weights = _shares(
        jnp.concatenate(before), jnp.concatenate(coefficients), subspaces, rule, scale, sign
    )
    out = list(vector)
    if rule == "none":
        return out, energies
    for group in groups:
        factors, kept = weights[group.rows], keep[group.rows]
        for place, axis in zip(group.leaves, group.axes, strict=True):
            leaf = vector[place]
            result = leaf.astype(jnp.float32)
            if rule != "orthogonal":
                result = result * spread(kept, leaf.ndim, axis)
            result = result - combination(factors, basis[place], axis)
            out[place] = result.astype(leaf.dtype)
    return out, energies


def _shares(
    before: jax.Array,
    coefficients: jax.Array,
    subspaces: Subspaces,
    rule: str,
    scale: Any,
    sign: float,
) -> tuple[Energies, jax.Array, jax.Array]:
    """What the rule does, how much it keeps of the vector ``[G]``, and takes of the basis.

    The latter ``[G, k]``; with the squared norms ``[G]`` and the inner products ``[G, k]`` given.
    """
    metric, mean = subspaces.metric, subspaces.mean
    # An infinite gradient times a zero direction is not a number: absent directions have no weight.
    present = jnp.diagonal(metric, axis1=-2, axis2=-1) > 0
    weights = multiply(metric, jnp.where(present, coefficients, 0.0)[:, :, None])[:, :, 0]
    in_span = jnp.sum(jnp.where(weights != 0, coefficients * weights, 0.0), axis=-1)
    one, zero = jnp.ones_like(before), jnp.zeros_like(before)
    keep, take = one, one
    if rule == "none":
        take = zero
    elif rule == "inplane":
        keep, take = zero, -one
    elif rule == "conflict":
        agreement = sign * jnp.sum(jnp.where(mean != 0, coefficients * mean, 0.0), axis=-1)
        keep = jnp.where(agreement > 0, jnp.asarray(scale, jnp.float32), one)
        take = jnp.where(agreement < 0, one, zero)
    after = keep**2 * (before - in_span) + (keep - take) ** 2 * in_span
    after = before if rule == "none" else jnp.maximum(after, 0.0)
    return Energies(before, in_span, after), keep, take[:, None] * weights
