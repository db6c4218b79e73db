"""Projecting the first moments of an optimizer's state with a new basis.

After a refresh, Adam's first moment still carries components along the old basis, and at high
learning rates undoes the projection. Not part of the paper; measured to matter.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ogpsa_jax.projection.find import find_states, is_ours, with_others
from ogpsa_jax.projection.groups import MASKED, Group, is_masked, key_names
from ogpsa_jax.projection.input_state import InputState
from ogpsa_jax.projection.input_subspace import project_inputs
from ogpsa_jax.projection.moments import is_moment, second_moment, why_impossible
from ogpsa_jax.projection.state import OgpsaState
from ogpsa_jax.projection.subspace import Subspaces, gram, project, pseudo_inverse

KeyPath = tuple[Any, ...]
Momentum = bool | Mapping[str, bool]
"""Whether to project first moments; a mapping, regex → bool, says so for paths of the state."""

_INSTEAD = "with placement='update' no moment needs it"


class _Place(NamedTuple):
    """Where the leaves of the parameters are, by their names."""

    projected: dict[
        tuple[str, ...], tuple[int, tuple[int, ...]]
    ]  # position and shape of each that has a basis
    masked: set[tuple[str, ...]]  # what the state leaves out, whole branches too

    def leaves_out(self, path: tuple[str, ...]) -> bool:
        return any(path[:n] in self.masked for n in range(len(path) + 1))


def project_first_moments(opt_state: Any, momentum: Momentum = True) -> Any:
    """Apply the rule of the projections in `opt_state` to every first moment there.

    So the orthogonal rule removes the component in the new basis, and rule ``none`` leaves all as
    it is. A moment counts as a gradient, and the conflict rule as one of scale 1. Of a group that
    lies in several states (global scope under ``partition`` or Muon) the leaves in each are
    projected alone, off what the basis has in them: their sum is then orthogonal to the basis,
    whatever the optimizers scale them by.

    Left alone are moments of leaves that no basis covers; what a wrapper around the projection has
    accumulated, which is still to pass through it; and entries that are zero or whose second moment
    is, for a step divides by its root: what only the references touch (the embedding of a token
    that was never trained on) would move by millions of times the learning rate.

    Raises:
      ValueError: a tree shaped like the parameters in a field that is not known, a moment of
        another shape, or an optimizer of which no projection of its state frees the next step;
        what `momentum` names is excepted. A key of `momentum` that fits nothing.
    """
    if not momentum:
        return opt_state
    walk = _Walk(find_states(opt_state), momentum if isinstance(momentum, Mapping) else {})
    new = walk.visit(opt_state, ())
    if unused := walk.rules.keys() - walk.used:
        raise ValueError(f"project_momentum: {min(unused)!r} fits no path of the optimizer's state")
    counts = iter(walk.counts)

    def count(node: Any) -> Any:
        if not is_ours(node):
            return node
        node = replace(node, projected_moments=jnp.asarray(next(counts), jnp.int32))
        if isinstance(node, InputState) and node.others is not None:
            return replace(node, others=count(node.others))
        return node

    return jax.tree.map(count, new, is_leaf=is_ours)


class _Walk:
    """One walk through a state: the user's declarations, and what it has done."""

    def __init__(
        self, states: Sequence[OgpsaState | InputState], rules: Mapping[str, bool]
    ) -> None:
        self.states, self.rules = with_others(states), rules
        self.places = [_places(state) for state in self.states]
        self.counts = [0] * len(self.states)  # leaves projected, by state
        self.used: set[str] = set()

    def told(self, path: KeyPath) -> bool | None:
        """What the caller says of this path: the first rule that fits."""
        name = jax.tree_util.keystr(path)
        fits = [rule for rule in self.rules if re.search(rule, name)]
        self.used.update(fits)
        return self.rules[fits[0]] if fits else None

    def visit(self, node: Any, path: KeyPath) -> Any:
        """`node` with the first moments below it projected."""
        if is_ours(node) or self.told(path) is False:
            return node
        if reason := why_impossible(node):
            raise ValueError(
                f"project_momentum: the steps of {type(node).__name__} ({_named(path)}) cannot be "
                f"freed of past gradients, because {reason}; {_INSTEAD}, and "
                f"project_momentum={_rule(path)} leaves it as it is"
            )
        keyed, treedef = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda child: child is not node
        )
        if jax.tree_util.treedef_is_leaf(treedef):
            return node
        names = [key_names(key)[0] for key, _ in keyed]
        second = second_moment(type(node), dict(zip(names, (x for _, x in keyed), strict=True)))
        after = []
        for key, child in keyed:
            new = self.visit_child(type(node), key, child, (*path, *key), _encloses(node))
            if new is not child and _same_structure(second, child):
                new = jax.tree.map(_unless_zero, new, child, second)
            after.append(new)
        return treedef.unflatten(after)

    def visit_child(
        self, owner: type, key: KeyPath, child: Any, path: KeyPath, encloses: bool
    ) -> Any:
        """`child`, a field of an `owner`, projected if it is a first moment, else visited.

        Raises:
          ValueError: it may be a moment, and cannot be projected as one.
        """
        told = self.told(path)
        known = is_moment(owner, key_names(key)[0]) if told is None else told
        if known is False:
            return child
        leaves = _leaves(child)
        alike = self.all_known(leaves)
        like = alike and any(
            name in place.projected and place.projected[name][1] == leaf.shape
            for place in self.places
            for name, leaf in leaves.items()
        )
        is_field = isinstance(key[0], jax.tree_util.GetAttrKey)
        # A lone number is taken for a setting, unless a state has it for a moment.
        if not any(leaf.ndim for leaf in leaves.values()) and not (known and is_field and like):
            return self.visit(child, path)
        if known is None:
            if not like:
                return self.visit(child, path)
            raise ValueError(
                f"project_momentum: {_named(path)} in {owner.__name__} has the parameters' shapes, "
                "and it is not known whether it adds up gradients for later steps; say so with "
                f"project_momentum={_rule(path, 'True')}, or with False leave it as it is"
            )
        if encloses and told is None:  # it has yet to pass through the projection
            return child
        if not (is_field or told or alike):
            return self.visit(child, path)
        self.check(leaves, path)
        return self.projected(child) if like else child

    def all_known(self, leaves: dict[tuple[str, ...], Any]) -> bool:
        return all(
            any(path in place.projected or place.leaves_out(path) for place in self.places)
            for path in leaves
        )

    def check(self, leaves: dict[tuple[str, ...], Any], path: KeyPath) -> None:
        """Refuse a moment that has other leaves than the parameters, or of other shapes."""
        for name, leaf in leaves.items():
            shapes = [place.projected[name][1] for place in self.places if name in place.projected]
            known = shapes or any(place.leaves_out(name) for place in self.places)
            if known and leaf.shape in (shapes or [leaf.shape]):
                continue
            told = f"where the parameters have {shapes[0]}" if shapes else "and they have no such"
            raise ValueError(
                f"project_momentum: {_named(path)} is a first moment that is not shaped like the "
                f"parameters: it has a leaf {'/'.join(name)!r} of shape {leaf.shape}, {told} leaf; "
                f"{_INSTEAD}, and project_momentum={_rule(path)} leaves it as it is"
            )

    def projected(self, tree: Any) -> Any:
        """`tree`, a first moment, after the rule of each state that contains leaves of it."""
        keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
        leaves = [leaf for _, leaf in keyed]
        for number, (state, place) in enumerate(zip(self.states, self.places, strict=True)):
            positions = {
                place.projected[key_names(key)][0]: i
                for i, (key, leaf) in enumerate(keyed)
                if not is_masked(leaf) and key_names(key) in place.projected
            }
            if not positions:
                continue
            new = project_some(state, {at: leaves[i] for at, i in positions.items()})
            for at, i in positions.items():
                leaves[i] = new[at]
            self.counts[number] += len(positions)
        return treedef.unflatten(leaves)


def project_some(
    state: OgpsaState | InputState, leaves: dict[int, jax.Array]
) -> dict[int, jax.Array]:
    """Apply the state's rule to some of its projected leaves, given by their positions.

    A group of which only some leaves are given is projected off the restriction of its basis to
    them, whose Gram matrix is made here.
    """
    if isinstance(state, InputState):
        given = [leaves.get(place, MASKED) for place in range(len(state.settings.paths))]
        out, _ = project_inputs(given, state, freeze=False)
        return {place: out[place] for place in leaves}
    full = state.subspaces()
    order = sorted(leaves)
    groups: list[Group] = []
    rows: list[int] = []
    partial: list[Group] = []
    for group in state.settings.groups:
        own = [
            (at, axis) for at, axis in zip(group.leaves, group.axes, strict=True) if at in leaves
        ]
        if not own:
            continue
        positions, axes = zip(*own, strict=True)
        alone = group._replace(
            leaves=tuple(order.index(at) for at in positions), axes=axes, start=len(rows)
        )
        groups.append(alone)
        rows += range(group.rows.start, group.rows.stop)
        if len(own) < len(group.leaves):
            partial.append(alone)
    some = np.asarray(rows)
    directions = [[direction[at] for at in order] for direction in full.directions]
    metric = full.metric_GxKxK[some]
    for group in partial:
        stacked = [jnp.stack([d[i] for d in directions]) for i in group.leaves]
        alone = group._replace(leaves=tuple(range(len(stacked))), start=0)
        inverse, _ = pseudo_inverse(gram(stacked, [alone]), state.settings.rank_tol)
        metric = metric.at[group.rows].set(inverse)
    subspaces = Subspaces(directions, metric, full.mean_GxK[some])
    before = [leaves[at] for at in order]
    projected, _ = project(before, subspaces, groups, state.settings.rule, 1.0)
    return dict(zip(order, projected, strict=True))


def _unless_zero(new: jax.Array, old: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.where((second == 0) | (old == 0), old, new)


def _same_structure(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b)  # type: ignore[operator]


def _encloses(node: Any) -> bool:
    return any(is_ours(x) for x in jax.tree.leaves(node, is_leaf=is_ours))


def _places(state: OgpsaState | InputState) -> _Place:
    if isinstance(state, InputState):
        kernels = {kernel.path: (kernel.leaf, kernel.shape) for kernel in state.settings.kernels}
        return _Place(kernels, set(state.settings.paths) - set(kernels))
    projected: dict[tuple[str, ...], tuple[int, tuple[int, ...]]] = {}
    masked = set()
    tree = state.basis[0]
    for key, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked):
        if is_masked(leaf):
            masked.add(key_names(key))
        else:
            projected[key_names(key)] = (len(projected), leaf.shape)
    return _Place(projected, masked)


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """The floating-point arrays of a tree, by their names."""
    keyed = jax.tree_util.tree_leaves_with_path(tree)
    return {
        key_names(key): leaf
        for key, leaf in keyed
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def _named(path: KeyPath) -> str:
    return "opt_state" + jax.tree_util.keystr(path)


def _rule(path: KeyPath, value: str = "False") -> str:
    return f"{{r'{re.escape(jax.tree_util.keystr(path))}': {value}}}"
