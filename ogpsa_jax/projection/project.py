"""What happens to the component of a vector that lies in the reference subspace of its group.

``P v = Q M Qᵀ v`` with ``M = (QᵀQ)⁻¹``; coefficients in float32, the result in the vector's dtype.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import Group, spread, sum_products

Rule = Literal["orthogonal", "conflict", "inplane", "none"]
RULES: tuple[str, ...] = ("orthogonal", "conflict", "inplane", "none")


class Projected(NamedTuple):
    """A group's part of a vector after the rule, and what the rule took."""

    leaves: list[jax.Array]
    in_span: jax.Array  # float32 group.shape: squared norm of the component in the span
    before: jax.Array  # float32 group.shape: squared norm
    after: jax.Array  # float32 group.shape: squared norm


def project(
    vector: Sequence[jax.Array],
    basis: Sequence[Sequence[jax.Array]],
    metric: jax.Array,
    mean: jax.Array,
    group: Group,
    rule: str,
    scale: float,
    sign: float = 1.0,
) -> Projected:
    """Apply `rule` to the group's part of a gradient or an update.

    Args:
      vector: leaves of the group.
      basis: ``basis[j][i]``, direction j, leaf i of the group, any float dtype.
      metric: float32 ``group.shape + (k, k)``.
      mean: float32 ``group.shape + (k,)``, the sum of the unit references in the basis: what the
        conflict rule compares with. With one reference its sign is that of ⟨vector, reference⟩,
        the official ``threshold``.
      group: how the leaves belong together.
      rule: one of `RULES`.
      scale: factor of the conflict rule where vector and references agree.
      sign: +1 for a gradient, −1 for an update (which points down its gradient).
    """
    coefficients = jnp.stack([_inner(direction, vector, group) for direction in basis], axis=-1)
    weights = jnp.sum(metric * coefficients[..., None, :], axis=-1)
    in_span = jnp.sum(coefficients * weights, axis=-1)
    before = _inner(vector, vector, group)
    one, zero = jnp.ones_like(before), jnp.zeros_like(before)
    # vector -> keep * vector - take * (component in the span)
    if rule == "orthogonal":
        keep, take = one, one
    elif rule == "inplane":
        keep, take = zero, -one
    elif rule == "conflict":
        agreement = sign * jnp.sum(coefficients * mean, axis=-1)
        keep = jnp.where(agreement > 0, scale, one)
        take = jnp.where(agreement < 0, one, zero)
    else:
        keep, take = one, zero
    after = keep**2 * (before - in_span) + (keep - take) ** 2 * in_span
    if rule == "none":
        return Projected(list(vector), in_span, before, before)
    leaves = []
    for i, (leaf, axis) in enumerate(zip(vector, group.axes, strict=True)):
        out = leaf.astype(jnp.float32)
        if rule in ("inplane", "conflict"):
            out = out * spread(keep, leaf, axis)
        for j, direction in enumerate(basis):
            factor = spread(take * weights[..., j], leaf, axis)
            out = out - factor * direction[i].astype(jnp.float32)
        leaves.append(out.astype(leaf.dtype))
    return Projected(leaves, in_span, before, jnp.maximum(after, 0.0))


def _inner(a: Sequence[jax.Array], b: Sequence[jax.Array], group: Group) -> jax.Array:
    total = jnp.zeros(group.shape, jnp.float32)
    for x, y, axis in zip(a, b, group.axes, strict=True):
        total = total + sum_products(x, y, axis)
    return total
