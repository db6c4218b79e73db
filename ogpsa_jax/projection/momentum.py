"""Projecting the first moments of an optimizer's state with a new basis.

After a refresh, Adam's first moment still carries components along the old basis, and at high
learning rates undoes the projection. Not part of the paper; measured to matter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from ogpsa_jax.projection.find import find_states
from ogpsa_jax.projection.groups import Group, is_masked
from ogpsa_jax.projection.project import Subspaces, project
from ogpsa_jax.projection.state import OgpsaState

# Every state of Optax that holds running means of gradients, and their fields.
FIRST_MOMENTS: dict[type, tuple[str, ...]] = {
    optax.ScaleByAdamState: ("mu",),
    optax.ScaleByAdanState: ("m",),
    optax.ScaleByAmsgradState: ("mu",),
    optax.ScaleByBeliefState: ("mu",),
    optax.ScaleByLionState: ("mu",),
    optax.ScaleByNovogradState: ("mu",),
    optax.EmaState: ("ema",),
    optax.TraceState: ("trace",),
    optax.contrib.DAdaptAdamWState: ("exp_avg",),
    optax.contrib.MomoAdamState: ("exp_avg",),
    optax.contrib.MomoState: ("exp_avg",),
    optax.contrib.MuonState: ("mu",),
    optax.contrib.ProdigyState: ("exp_avg",),
    optax.contrib.ScaleByAdemamixState: ("m1", "m2"),
    optax.contrib.ScaleBySimplifiedAdEMAMixState: ("m",),
    optax.contrib.SophiaState: ("mu",),
}
_SECOND_MOMENTS = ("nu", "n", "exp_avg_sq")  # fields of these states that divide the first moment
_STOPS = (*FIRST_MOMENTS, OgpsaState)


def project_first_moments(opt_state: Any) -> Any:
    """Apply the rule of the projections in `opt_state` to every first moment there.

    So the orthogonal rule removes the component in the new basis, and rule ``none`` leaves all as
    it is. A moment counts as a gradient, and the conflict rule as one of scale 1. Moments of leaves
    that no basis covers stay; and so do entries whose second moment is zero, for a step divides by
    its root: what only the references touch (the embedding of a token that was never trained on)
    would move by millions of times the learning rate.
    """
    states = find_states(opt_state)

    def change(node: Any) -> Any:
        fields = FIRST_MOMENTS.get(type(node), ())
        if not fields:
            return node
        before = {field: getattr(node, field) for field in fields}
        moments = before
        for state in states:
            moments = {field: _project_tree(tree, state) for field, tree in moments.items()}
        second = next(
            (getattr(node, name) for name in _SECOND_MOMENTS if name in node._fields), None
        )
        if second is not None:
            moments = {
                field: jax.tree.map(_unless_zero, tree, before[field], second)
                for field, tree in moments.items()
            }
        return node._replace(**moments)

    return jax.tree.map(change, opt_state, is_leaf=lambda x: isinstance(x, _STOPS))


def _unless_zero(new: jax.Array, old: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.where(second == 0, old, new)


def _project_tree(tree: Any, state: OgpsaState) -> Any:
    """`tree` projected where it holds whole groups of `state`.

    A moment may be masked otherwise than the basis (``partition``, ``masked``), so leaves are
    matched by their place in the full tree. Without all leaves of a group it is left alone.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_masked)
    own = jax.tree.leaves(state.basis[0], is_leaf=is_masked)
    if treedef != jax.tree.structure(state.basis[0], is_leaf=is_masked):  # type: ignore[operator]
        return tree
    places = [i for i, leaf in enumerate(own) if not is_masked(leaf)]
    groups: list[Group] = []
    rows: list[int] = []
    for group in state.settings.groups:
        if not any(is_masked(leaves[places[i]]) for i in group.leaves):
            groups.append(group._replace(start=len(rows)))
            rows += range(group.rows.start, group.rows.stop)
    if not groups:
        return tree
    held = [leaves[place] for place in places]
    full = state.subspaces()
    some = np.asarray(rows)
    subspaces = Subspaces(full.directions, full.metric[some], full.mean[some])
    projected, _ = project(held, subspaces, groups, state.settings.rule, 1.0)
    for place, leaf in zip(places, projected, strict=True):
        leaves[place] = leaf
    return treedef.unflatten(leaves)
