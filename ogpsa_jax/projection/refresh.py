"""Replacing the basis: a pure function of the optimizer state, whatever wraps ours.

States are found by type, never by field name. (Passing references through ``update`` instead is
silently dropped by ``MultiSteps`` and refused by ``partition``.)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax.projection.groups import Group
from ogpsa_jax.projection.project import project
from ogpsa_jax.projection.state import Alignment, OgpsaState, of_group
from ogpsa_jax.projection.subspace import Subspace, metric, span, unit

# Every state of Optax that holds a first moment, and its field.
_FIRST_MOMENTS: dict[type, str] = {
    optax.ScaleByAdamState: "mu",
    optax.ScaleByLionState: "mu",
    optax.ScaleByBeliefState: "mu",
    optax.ScaleByAmsgradState: "mu",
    optax.ScaleByNovogradState: "mu",
    optax.ScaleByAdanState: "m",
    optax.TraceState: "trace",
}


def find_states(opt_state: Any) -> list[OgpsaState]:
    """All states of :func:`ogpsa_jax.ogpsa_project` inside `opt_state`, in tree order."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, OgpsaState))
    return [leaf for leaf in leaves if isinstance(leaf, OgpsaState)]


def require_states(opt_state: Any) -> list[OgpsaState]:
    """As :func:`find_states`, but finding none is an error that names what was looked through."""
    found = find_states(opt_state)
    if not found:
        raise ValueError(
            "found no OgpsaState in the optimizer state, having looked through "
            f"{_outline(opt_state)}; is ogpsa_project(...) in the chain?"
        )
    return found


def replace_states(opt_state: Any, change: Callable[[OgpsaState], OgpsaState]) -> Any:
    """`opt_state` with every state of ours changed."""
    return jax.tree.map(
        lambda x: change(x) if isinstance(x, OgpsaState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, OgpsaState),
    )


def refresh(opt_state: Any, references: Sequence[Any], *, project_momentum: bool = False) -> Any:
    """Span the basis anew with reference gradients. Pure and jittable.

    Args:
      opt_state: any Optax state, ``TrainState`` or pytree with an :class:`OgpsaState` inside
        (``chain``, ``MultiSteps``, ``masked``, ``partition``, ``inject_hyperparams``, ...).
      references: m gradients, pytrees like the parameters. More than the rank: their principal
        directions are kept; fewer: the other directions are zero.
      project_momentum: also project every first moment found (Adam and its kin, Lion, momentum)
        with the new basis. Off reproduces the paper; on is recommended: a first moment carries
        components of the old basis, and at high learning rates undoes the projection.

    Returns:
      The new optimizer state. References that are not finite change nothing and are counted in
      ``refused_refreshes``.

    Raises:
      ValueError: no reference, no :class:`OgpsaState`, or references shaped otherwise.
    """
    references = list(references)
    if not references:
        raise ValueError("references: expected at least one reference gradient, got none")
    require_states(opt_state)
    opt_state = replace_states(opt_state, lambda state: _respan(state, references))
    return project_first_moments(opt_state) if project_momentum else opt_state


def push_reference(
    opt_state: Any, reference: Any, *, window: int, project_momentum: bool = False
) -> Any:
    r"""Fold one reference gradient into the basis, remembering about `window` of them.

    The basis is the best rank-k summary of a decaying sum of outer products of unit references,
    :math:`A \leftarrow (1 - 1/w) A + u u^\top`, updated exactly at rank k + 1 and truncated to k;
    what one truncation loses is the smallest eigenvalue, so that after any number of pushes
    :math:`\|A - A_k\|_2 \le \sum_t (1 - 1/w)^{T-t} \delta_t`. Never more than k + 1 directions are
    held. A window of 1 forgets everything before: this reference alone.

    Args:
      opt_state: as for :func:`refresh`.
      reference: one gradient, a pytree like the parameters.
      window: how many references the basis remembers, at least 1.
      project_momentum: as for :func:`refresh`.

    Returns:
      The new optimizer state; unchanged but for a count if the reference is not finite.

    Raises:
      ValueError: `window` below 1, no :class:`OgpsaState`, or a reference of another shape.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    require_states(opt_state)
    decay = 1.0 - 1.0 / window
    opt_state = replace_states(opt_state, lambda state: _push(state, reference, decay))
    return project_first_moments(opt_state) if project_momentum else opt_state


def project_first_moments(opt_state: Any) -> Any:
    """Project every first moment in `opt_state` with the bases there, whatever the rule."""
    states = require_states(opt_state)

    def change(node: Any) -> Any:
        name = _FIRST_MOMENTS.get(type(node))
        if name is None:
            return node
        moment = getattr(node, name)
        for state in states:
            moment = _project_tree(moment, state)
        return node._replace(**{name: moment})

    stops = (*_FIRST_MOMENTS, OgpsaState)
    return jax.tree.map(change, opt_state, is_leaf=lambda x: isinstance(x, stops))


def _project_tree(tree: Any, state: OgpsaState) -> Any:
    """The held leaves of `tree` projected; `tree` itself where another mask made it."""
    try:
        aligned = Alignment(state, tree, "first moment")
    except (ValueError, AttributeError):
        return tree
    directions = [jax.tree.leaves(direction) for direction in state.basis]
    new = list(aligned.leaves)
    for group, weights, mean in zip(state.settings.groups, state.metric, state.mean, strict=True):
        result = project(
            of_group(aligned.leaves, group),
            [of_group(leaves, group) for leaves in directions],
            weights,
            mean,
            group,
            "orthogonal",
            1.0,
        )
        for position, leaf in zip(group.leaves, result.leaves, strict=True):
            new[position] = leaf
    return aligned.rebuild(new)


def _respan(state: OgpsaState, references: Sequence[Any]) -> OgpsaState:
    held = [Alignment(state, tree, "references").leaves for tree in references]

    def new(group: Group, index: int) -> tuple[Subspace, jax.Array]:
        units, finite = zip(*(unit(of_group(leaves, group), group) for leaves in held), strict=True)
        stacked = [jnp.stack(parts) for parts in zip(*units, strict=True)]
        subspace = span(stacked, group, state.settings.rank, state.settings.rank_tol)
        return subspace, jnp.all(jnp.stack([jnp.all(x) for x in finite]))

    return _stored(state, new)


def _push(state: OgpsaState, reference: Any, decay: float) -> OgpsaState:
    held = Alignment(state, reference, "reference").leaves
    directions = [jax.tree.leaves(tree) for tree in state.basis]

    def new(group: Group, index: int) -> tuple[Subspace, jax.Array]:
        vector, finite = unit(of_group(held, group), group)
        weights = jnp.sqrt(decay * state.spectrum[index])  # (..., k)
        stacked = []
        for i, (leaf, axis) in enumerate(zip(vector, group.axes, strict=True)):
            rows = [of_group(leaves, group)[i].astype(jnp.float32) for leaves in directions]
            shape = tuple(-1 if n == axis else 1 for n in range(leaf.ndim))
            rows = [
                row * weights[..., j].reshape(shape if axis is not None else (1,) * leaf.ndim)
                for j, row in enumerate(rows)
            ]
            stacked.append(jnp.stack([*rows, leaf]))
        subspace = span(stacked, group, state.settings.rank, state.settings.rank_tol)
        return subspace, jnp.all(finite)

    return _stored(state, new)


def _stored(
    state: OgpsaState, new: Callable[[Group, int], tuple[Subspace, jax.Array]]
) -> OgpsaState:
    """`state` with a new subspace per group, in the dtype it stores; the old one if not finite."""
    groups = state.settings.groups
    results = [new(group, index) for index, group in enumerate(groups)]
    accept = jnp.all(jnp.stack([finite for _, finite in results]))
    old, treedef = jax.tree.flatten(state.basis)
    count = len(old) // state.settings.rank
    leaves = list(old)
    for group, (subspace, _) in zip(groups, results, strict=True):
        for position, stacked in zip(group.leaves, subspace.basis, strict=True):
            for j in range(state.settings.rank):
                place = j * count + position
                leaves[place] = jnp.where(accept, stacked[j].astype(old[place].dtype), old[place])
    metrics = []
    for group in groups:
        rows = [[leaves[j * count + i] for i in group.leaves] for j in range(state.settings.rank)]
        metrics.append(metric([jnp.stack(parts) for parts in zip(*rows, strict=True)], group))

    def chosen(field: str) -> tuple[jax.Array, ...]:
        before = getattr(state, field)
        name = "used" if field == "rank_used" else field
        after = [getattr(subspace, name) for subspace, _ in results]
        return tuple(jnp.where(accept, a, b) for a, b in zip(after, before, strict=True))

    return replace(
        state,
        basis=treedef.unflatten(leaves),
        metric=tuple(metrics),
        spectrum=chosen("spectrum"),
        mean=chosen("mean"),
        rank_used=chosen("rank_used"),
        steps_since_refresh=jnp.where(accept, 0, state.steps_since_refresh),
        refreshes=state.refreshes + accept.astype(jnp.int32),
        refused_refreshes=state.refused_refreshes + (~accept).astype(jnp.int32),
    )


def _outline(tree: Any) -> str:
    """The types of the nodes of a state, for an error message."""
    if isinstance(tree, tuple) and type(tree) is tuple:
        return "(" + ", ".join(_outline(item) for item in tree) + ")"
    if isinstance(tree, tuple):
        inside = [
            f"{name}={_outline(value)}"
            for name, value in tree._asdict().items()
            if isinstance(value, tuple)
        ]
        return type(tree).__name__ + (f"[{', '.join(inside)}]" if inside else "")
    return type(tree).__name__
