"""What the projection did, for logs: cheap device scalars, nothing recomputed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.refresh import require_states


def diagnostics(opt_state: Any) -> dict[str, Any]:
    """What every projection found in `opt_state` did at its last update. Jittable.

    Args:
      opt_state: as for :func:`ogpsa_jax.refresh`.

    Returns:
      In total, float32 or int32 scalars: ``removed_fraction`` of the squared norm,
      ``effective_rank`` (mean over groups), ``steps_since_refresh``, ``refreshes``,
      ``refused_refreshes`` (largest over states). Under ``"groups"``, by label: a dict of
      ``removed_fraction`` and ``effective_rank``, each ``()`` or ``(layers,)``.

    Raises:
      ValueError: no :class:`OgpsaState` in `opt_state`.
    """
    states = require_states(opt_state)
    groups: dict[str, dict[str, jax.Array]] = {}
    removed = squared = ranks = jnp.zeros([], jnp.float32)
    count = 0
    for state in states:
        # Leaves, because an nnx.Optimizer keeps each array in a Variable.
        columns = map(jax.tree.leaves, (state.removed, state.squared_norm, state.rank_used))
        for group, taken, norm, rank in zip(state.settings.groups, *columns, strict=True):
            groups[group.label] = {
                "removed_fraction": _fraction(taken, norm),
                "effective_rank": rank,
            }
            removed, squared = removed + jnp.sum(taken), squared + jnp.sum(norm)
            ranks = ranks + jnp.sum(rank.astype(jnp.float32))
            count += rank.size
    return {
        "removed_fraction": _fraction(removed, squared),
        "effective_rank": ranks / count,
        "steps_since_refresh": _largest([state.steps_since_refresh for state in states]),
        "refreshes": _largest([state.refreshes for state in states]),
        "refused_refreshes": _largest([state.refused_refreshes for state in states]),
        "groups": groups,
    }


def first_order_change(references: Sequence[Any], updates: Any) -> jax.Array:
    """Cosine of the step with each reference gradient: what it does to each loss to first order.

    Args:
      references: m gradients, pytrees like the parameters.
      updates: the step that is added to the parameters.

    Returns:
      float32 ``[m]``: ``⟨r_i, step⟩ / (‖r_i‖ ‖step‖)``; positive raises the reference loss, zero
      leaves it alone; 0 where either is zero.
    """

    def product(a: Any, b: Any) -> jax.Array:
        leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(
            (jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)) for x, y in leaves),
            jnp.zeros([], jnp.float32),
        )

    length = jnp.sqrt(product(updates, updates))
    cosines = []
    for reference in references:
        norm = jnp.sqrt(product(reference, reference)) * length
        safe = jnp.where(norm > 0, norm, 1.0)
        cosines.append(jnp.where(norm > 0, product(reference, updates) / safe, 0.0))
    return jnp.stack(cosines)


def _fraction(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)


def _largest(values: list[jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(jax.tree.leaves(values)))
