"""The state of the transformation: arrays that change, and settings that are part of its type."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax.projection.groups import Group, is_masked
from ogpsa_jax.projection.project import Subspaces
from ogpsa_jax.projection.serialization import serialisable


@dataclass(frozen=True)
class Settings:
    """Hashable settings of one transformation: static in the tree structure of its state."""

    rank: int
    rule: str
    rank_tol: float
    held: tuple[bool, ...]  # of each leaf of the parameters: whether it has a basis
    groups: tuple[Group, ...]  # over the held leaves


class Placeholder:
    """Mixed into settings over a tree without leaves, where nothing is projected: equal to any.

    ``optax.tree.map_params`` makes a state of a placeholder without leaves and maps over it and the
    real one together, which asks for equal structures.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self).__mro__[2])

    def __hash__(self) -> int:
        return 0


class NoLeaves(Placeholder, Settings):
    """Equal to any :class:`Settings`."""


@dataclass(frozen=True)
class ProjectionState:
    """What every projection keeps beside its subspace; G is the number of groups."""

    rank_used: jax.Array  # int32 [G]: directions that are present
    squared_norm: jax.Array  # float32 [G]: of the last gradient, before the rule
    in_span: jax.Array  # float32 [G]: of its component in the subspace
    removed: jax.Array  # float32 [G]: what the rule took of its squared norm
    steps_since_refresh: jax.Array  # int32 []: updates since the subspace last changed
    refreshes: jax.Array  # int32 []: refreshes accepted
    refused_refreshes: (
        jax.Array
    )  # int32 []: refreshes refused, as what they were given is not finite
    projected_moments: jax.Array  # int32 []: leaves of first moments the last refresh projected

    def after_update(self, squared_norm: jax.Array, in_span: jax.Array, removed: jax.Array) -> Self:
        """The state that has measured one update more."""
        return replace(
            self,
            squared_norm=squared_norm,
            in_span=in_span,
            removed=removed,
            steps_since_refresh=optax.safe_increment(self.steps_since_refresh),
        )

    def after_refresh(self, accept: jax.Array, **subspace: Any) -> Self:
        """The state with the fields of another subspace if `accept`; else one refusal more."""
        chosen = {
            name: jax.tree.map(partial(jnp.where, accept), new, getattr(self, name))
            for name, new in subspace.items()
        }
        return replace(
            self,
            steps_since_refresh=jnp.where(accept, 0, self.steps_since_refresh),
            refreshes=self.refreshes + accept.astype(jnp.int32),
            refused_refreshes=self.refused_refreshes + (~accept).astype(jnp.int32),
            projected_moments=jnp.zeros([], jnp.int32),
            **chosen,
        )


def no_figures(groups: int) -> dict[str, jax.Array]:
    """The fields of :class:`ProjectionState` before the first update and refresh."""
    # Each an array of its own: aliased buffers cannot be donated.
    names = ("squared_norm", "in_span", "removed")
    counts = ("steps_since_refresh", "refreshes", "refused_refreshes", "projected_moments")
    return {
        "rank_used": jnp.zeros(groups, jnp.int32),
        **{name: jnp.zeros(groups, jnp.float32) for name in names},
        **{name: jnp.zeros([], jnp.int32) for name in counts},
    }


@serialisable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OgpsaState(ProjectionState):
    """State of :func:`ogpsa_jax.ogpsa_project`; k is the rank, G the number of groups.

    Every layer of a stacked leaf counts as a group where the scope is not global.
    """

    basis: tuple[Any, ...]  # k trees, shaped, typed and sharded like the parameters
    gram: jax.Array  # float32 [G, k, k]: of the basis as stored
    metric: jax.Array  # float32 [G, k, k]: its inverse, zero where a direction is absent
    spectrum: jax.Array  # float32 [G, k]: energy of the unit references by direction
    mean: jax.Array  # float32 [G, k]: sum of the unit references, in the basis
    discarded: jax.Array  # float32 [G]: energy of the unit references outside the basis, at most
    settings: Settings = field(metadata={"static": True})

    def directions(self) -> list[list[jax.Array]]:
        """The basis as k flat lists of the held leaves."""
        return [jax.tree.leaves(tree) for tree in self.basis]

    def subspaces(self) -> Subspaces:
        """What the projection needs of it."""
        return Subspaces(self.directions(), self.metric, self.mean)


class Alignment:
    """Finds the leaves a state holds in any tree shaped like its parameters, and puts them back.

    The tree may carry other containers than the parameters did (bare arrays for ``nnx.Param``), and
    may hold leaves that the state's wrapper masks.
    """

    def __init__(self, state: OgpsaState, tree: Any, what: str) -> None:
        leaves, treedef = jax.tree.flatten(tree)
        held = state.settings.held
        if len(leaves) != len(held):
            template = jax.tree.structure(state.basis[0], is_leaf=is_masked)
            masks = [is_masked(x) for x in jax.tree.leaves(state.basis[0], is_leaf=is_masked)]
            try:
                leaves = template.flatten_up_to(tree)
            except ValueError as error:
                raise ValueError(
                    f"{what}: expected a tree shaped like the parameters ({len(held)} leaves), got "
                    f"{len(leaves)} leaves: {error}"
                ) from error
            held, treedef = tuple(not mask for mask in masks), template
        else:
            _check_names(tree, state.basis[0], what)
        self._leaves, self._treedef, self._held = leaves, treedef, held
        self.leaves = [leaf for leaf, holds in zip(leaves, held, strict=True) if holds]
        named = jax.tree_util.tree_leaves_with_path(state.basis[0])
        for leaf, (path, own) in zip(self.leaves, named, strict=True):
            name = jax.tree_util.keystr(path)
            if not hasattr(leaf, "shape"):  # a whole tree where the state has one leaf
                raise ValueError(
                    f"{what}: expected a tree shaped like the parameters, got one that branches "
                    f"({type(leaf).__name__}) where they have a leaf of shape {own.shape} ({name})"
                )
            if leaf.shape != own.shape:
                raise ValueError(
                    f"{what}: a leaf of shape {leaf.shape} where the parameters have {own.shape} "
                    f"({name})"
                )

    def rebuild(self, leaves: Sequence[jax.Array]) -> Any:
        """The tree with its held leaves replaced."""
        new = iter(leaves)
        return self._treedef.unflatten(
            [
                next(new) if holds else old
                for old, holds in zip(self._leaves, self._held, strict=True)
            ]
        )


def _check_names(tree: Any, own: Any, what: str) -> None:
    """Refuse a tree of as many leaves under other names: they would be taken for one another."""

    def names(tree: Any) -> list[list[str]]:
        paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
        keys = jax.tree_util.DictKey
        return [[str(key.key) for key in path if isinstance(key, keys)] for path, _ in paths]

    for theirs, ours in zip(names(tree), names(own), strict=False):
        if theirs != ours:
            raise ValueError(
                f"{what}: expected a tree shaped like the parameters, got a leaf at "
                f"{'/'.join(theirs) or 'no name'} where they have {'/'.join(ours) or 'no name'}"
            )
