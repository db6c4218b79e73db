"""What the projection did, for logs: cheap device scalars, nothing recomputed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.find import find_states, with_others
from ogpsa_jax.projection.input_state import InputState
from ogpsa_jax.projection.reference import as_list
from ogpsa_jax.projection.state import Alignment, OgpsaState
from ogpsa_jax.projection.subspace import project


def diagnostics(opt_state: Any) -> dict[str, Any]:
    """What every projection found in `opt_state` did at its last update. Jittable.

    Args:
      opt_state: as for :func:`ogpsa_jax.refresh`.

    Returns:
      In total, device scalars: ``removed_fraction`` of the squared norm (float32; negative where
      the conflict rule scales up), ``in_span_fraction`` of it that lay in the subspace before,
      ``effective_rank`` (float32, mean over groups), ``reference_coverage`` (float32, the share of
      the references' energy inside the basis, at least; 0 before the first refresh),
      ``least_coverage`` (float32, the smallest of any group),
      ``steps_since_refresh``, ``refreshes`` and ``refused_refreshes`` (int32, the largest of all
      states), ``projected_moments`` (int32, the leaves of first moments that the last refresh
      projected; 0 where it was not asked to). Under ``"groups"``, by label: a dict of the first
      four, each ``()`` or ``(layers,)``.
      A subspace of inputs has its inputs as groups; ``reference_coverage`` is the share of their
      second moment that it covers, and ``dimension_fraction`` the share of their dimensions.

    Raises:
      ValueError: no :class:`OgpsaState` in `opt_state`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from ogpsa_jax import diagnostics, ogpsa_project, refresh
      >>> tx = ogpsa_project(rank=1)
      >>> state = refresh(tx.init(jnp.zeros(2)), [jnp.array([0.0, 1.0])])
      >>> _, state = tx.update(jnp.array([2.0, 2.0]), state)
      >>> float(jax.jit(diagnostics)(state)["removed_fraction"])
      0.5
    """
    states = find_states(opt_state)
    groups: dict[str, dict[str, jax.Array]] = {}
    total = _Figures(*[jnp.zeros([], jnp.float32)] * 6)
    count = 0
    for state in with_others(states):
        figures = _figures(state)
        count += len(figures.rank)
        total = _Figures(*(t + jnp.sum(x) for t, x in zip(total, figures, strict=True)))
        groups |= _by_group(state, figures)
    coverages = [jnp.min(group["reference_coverage"]) for group in groups.values()]
    return {
        **total.shares(),
        "effective_rank": total.rank / max(count, 1),
        "least_coverage": jnp.min(jnp.stack(coverages)) if groups else jnp.zeros([], jnp.float32),
        "steps_since_refresh": _largest([state.steps_since_refresh for state in states]),
        "refreshes": _largest([state.refreshes for state in states]),
        "refused_refreshes": _largest([state.refused_refreshes for state in states]),
        "projected_moments": _sum([state.projected_moments for state in states]),
        "groups": groups,
    }


class _Figures(NamedTuple):
    """What one projection measured, float32 ``[G]``; or their sums over groups."""

    squared_norm: jax.Array
    in_span: jax.Array
    removed: jax.Array
    rank: jax.Array
    captured: jax.Array  # energy of the references inside the basis
    missed: jax.Array  # and outside

    def shares(self) -> dict[str, jax.Array]:
        return {
            "removed_fraction": _fraction(self.removed, self.squared_norm),
            "in_span_fraction": _fraction(self.in_span, self.squared_norm),
            "effective_rank": self.rank,
            "reference_coverage": _fraction(self.captured, self.captured + self.missed),
        }


def _figures(state: OgpsaState | InputState) -> _Figures:
    # Leaves, because an nnx.Optimizer keeps each array in a Variable.
    squared_norm, in_span, removed, rank = jax.tree.leaves(
        (state.squared_norm, state.in_span, state.removed, state.rank_used)
    )
    if isinstance(state, InputState):
        (captured,) = jax.tree.leaves(state.energy_held)
        missed = (rank > 0).astype(jnp.float32) - captured
    else:
        spectrum, missed = jax.tree.leaves((state.spectrum, state.discarded))
        captured = jnp.sum(spectrum, axis=-1)
    return _Figures(squared_norm, in_span, removed, rank.astype(jnp.float32), captured, missed)


def _by_group(state: OgpsaState | InputState, figures: _Figures) -> dict[str, dict[str, jax.Array]]:
    """The figures of each group by its label, shaped like its layers."""
    values = {**figures.shares(), "effective_rank": figures.rank.astype(jnp.int32)}
    found = {}
    if not isinstance(state, InputState):
        for group in state.settings.groups:
            shape = () if group.layers is None else (group.layers,)
            found[group.label] = {n: x[group.rows].reshape(shape) for n, x in values.items()}
        return found
    rows = state.settings.rows()
    for name, kernels in state.settings.groups.items():
        layers, width = kernels[0].layers, kernels[0].width
        found[name] = {n: x[rows[name]].reshape(layers) for n, x in values.items()}
        found[name]["dimension_fraction"] = figures.rank[rows[name]].reshape(layers) / width
    return found


def first_order_change(references: Sequence[Any], updates: Any) -> jax.Array:
    """Cosine of the step with each reference gradient: what it does to each loss to first order.

    Args:
      references: m gradients, pytrees like the parameters.
      updates: the step that is added to the parameters.

    Returns:
      float32 ``[m]``: ``⟨r_i, step⟩ / (‖r_i‖ ‖step‖)``; positive raises the reference loss, zero
      leaves it alone; 0 where either is zero, NaN where either is not finite.

    Raises:
      ValueError: no reference, or no list of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from ogpsa_jax import first_order_change
      >>> step = jnp.array([0.0, -3.0])
      >>> [float(x) for x in first_order_change(list(jnp.eye(2)), step)]
      [0.0, -1.0]
    """
    step = _unit_scaled(updates)
    length = jnp.sqrt(_product(step, step))
    cosines = []
    for tree in as_list(references, "references", "reference gradient"):
        reference = _unit_scaled(tree)
        norm = jnp.sqrt(_product(reference, reference)) * length
        cosine = _product(reference, step) / jnp.where(norm == 0, 1.0, norm)
        cosines.append(jnp.where(norm == 0, 0.0, cosine))
    return jnp.stack(cosines)


def mean_cosine(references: Sequence[Any]) -> jax.Array:
    """Of each two of several gradients, as a mean over the pairs; float32 ``()``.

    Args:
      references: two pytrees or more.
    """
    pairs = [
        first_order_change(references[:i], reference)
        for i, reference in enumerate(references)
        if i > 0
    ]
    return jnp.mean(jnp.concatenate(pairs))


def captured_fraction(opt_state: Any, references: Sequence[Any]) -> jax.Array:
    """The share that the basis covers of gradients that it was not spanned with.

    Args:
      opt_state: as for :func:`ogpsa_jax.refresh`, with a subspace of gradients inside.
      references: m gradients, pytrees like the parameters.

    Returns:
      float32 ``()``: ``‖P r_i‖² / ‖r_i‖²``, as a mean over the references; 0 where `r_i` is zero.
    """
    (state, *_) = (s for s in find_states(opt_state) if isinstance(s, OgpsaState))
    shares = []
    for tree in references:
        leaves, treedef = jax.tree.flatten(tree)
        scaled = treedef.unflatten(_unit_scaled(leaves))
        reference_N = Alignment(state, scaled, "references").leaves
        energies = project(reference_N, state.subspaces(), state.settings.groups, "none", 1.0)[1]
        shares.append(_fraction(jnp.sum(energies.in_span), jnp.sum(energies.before)))
    return jnp.mean(jnp.stack(shares))


def _unit_scaled(tree: Any) -> list[jax.Array]:
    """The leaves in float32, divided by the largest entry: their squares are finite and not 0."""
    leaves = [jnp.asarray(leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    zero = jnp.zeros([], jnp.float32)
    largest = jnp.stack([zero, *(jnp.max(jnp.abs(x), initial=0.0) for x in leaves)]).max()
    return [x / jnp.where(largest > 0, largest, 1.0) for x in leaves]


def _product(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    pairs = zip(a, b, strict=True)
    return sum((jnp.sum(x * y) for x, y in pairs), jnp.zeros([], jnp.float32))


def _fraction(part: jax.Array, whole: jax.Array) -> jax.Array:
    return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1.0), 0.0)


def _largest(values: list[jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack(jax.tree.leaves(values)))


def _sum(values: list[jax.Array]) -> jax.Array:
    return jnp.sum(jnp.stack(jax.tree.leaves(values)))
