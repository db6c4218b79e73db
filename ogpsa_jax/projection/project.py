"""What happens to the component of a vector that lies in the reference subspace of its group.

``P v = Q M Qᵀ v`` with ``M = (QᵀQ)⁻¹``; coefficients in float32, the result in the vector's dtype.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import Group, inner, spread

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
    out = list(vector)
    energies = []
    for group in groups:
        leaves, energy = _project_group(vector, subspaces, group, rule, scale, sign)
        for place, leaf in zip(group.leaves, leaves, strict=True):
            out[place] = leaf
        energies.append(energy)
    return out, Energies(*(jnp.concatenate(parts) for parts in zip(*energies, strict=True)))


def _project_group(
    vector: Sequence[jax.Array],
    subspaces: Subspaces,
    group: Group,
    rule: str,
    scale: Any,
    sign: float,
) -> tuple[list[jax.Array], Energies]:
    own = group.of(vector)
    basis = [group.of(direction) for direction in subspaces.directions]
    metric, mean = subspaces.metric[group.rows], subspaces.mean[group.rows]
    coefficients = jnp.stack([inner(own, direction, group) for direction in basis], axis=-1)
    weights = jnp.sum(metric * coefficients[:, None, :], axis=-1)
    # An infinite gradient times a zero direction is not a number: absent directions have no weight.
    weights = jnp.where(jnp.diagonal(metric, axis1=-2, axis2=-1) > 0, weights, 0.0)
    before = inner(own, own, group)
    in_span = jnp.sum(jnp.where(weights != 0, coefficients * weights, 0.0), axis=-1)
    if rule == "none":
        return own, Energies(before, in_span, before)
    # vector → keep · vector − take · (its component in the span)
    one, zero = jnp.ones_like(before), jnp.zeros_like(before)
    keep, take = one, one
    if rule == "inplane":
        keep, take = zero, -one
    elif rule == "conflict":
        agreement = sign * jnp.sum(jnp.where(mean != 0, coefficients * mean, 0.0), axis=-1)
        keep = jnp.where(agreement > 0, jnp.asarray(scale, jnp.float32), one)
        take = jnp.where(agreement < 0, one, zero)
    after = keep**2 * (before - in_span) + (keep - take) ** 2 * in_span
    leaves = []
    for i, (leaf, axis) in enumerate(zip(own, group.axes, strict=True)):
        result = leaf.astype(jnp.float32)
        if rule != "orthogonal":
            result = result * spread(keep, leaf.ndim, axis)
        for j, direction in enumerate(basis):
            factor = spread(take * weights[:, j], leaf.ndim, axis)
            result = result - factor * direction[i].astype(jnp.float32)
        leaves.append(result.astype(leaf.dtype))
    return leaves, Energies(before, in_span, jnp.maximum(after, 0.0))
