"""The state of the transformation: arrays that change, and settings that are part of its type."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax.projection import xla
from ogpsa_jax.projection.groups import (
    MASKED,
    Group,
    Scope,
    Stacked,
    form_groups,
    is_masked,
)
from ogpsa_jax.projection.serialization import serialisable
from ogpsa_jax.projection.subspace import (
    Leaves,
    Span,
    Subspaces,
    gram,
    orthonormalise,
    pseudo_inverse,
)


@dataclass(frozen=True)
class Settings:
    """Hashable settings of one transformation: static in the tree structure of its state."""

    rank: int
    rule: str
    rank_tol: float
    projected: tuple[bool, ...]  # of each leaf of the parameters: whether it has a basis
    groups: tuple[Group, ...]  # over those that have one


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
        """The basis as k flat lists of the projected leaves."""
        return [jax.tree.leaves(tree) for tree in self.basis]

    def subspaces(self) -> Subspaces:
        """What the projection needs of it."""
        return Subspaces(self.directions(), self.metric, self.mean)

    def stored(self, vectors: Leaves) -> list[jax.Array]:
        """Leaves rounded to the dtypes in which the basis is stored."""
        types = [leaf.dtype for leaf in self.directions()[0]]
        return [xla.round_to(leaf, dtype) for leaf, dtype in zip(vectors, types, strict=True)]

    def with_span(self, span: Span) -> Self:
        """The state with another subspace; if `span` is not finite, one refusal more."""
        directions, grams = self.directions(), []
        weights_GxMxK = span.weights_GxMxK
        for batch in xla.batches(span.vectors_MxN, self.settings.groups):
            found_KxN = orthonormalise(weights_GxMxK, span.vectors_MxN, batch)
            basis_KxN = self.stored([found_KxN.get(i, old) for i, old in enumerate(directions[0])])
            grams.append(gram(basis_KxN, batch))
            for k, direction in enumerate(directions):
                for place in found_KxN:
                    new = basis_KxN[place][k]
                    direction[place] = jnp.where(span.finite, new, direction[place])
            directions, weights_GxMxK = xla.one_after_another(directions, weights_GxMxK)
        gram_GxKxK = jnp.concatenate(grams)
        # Directions that orthonormalising dropped have no energy either.
        present_GxK = jnp.diagonal(gram_GxKxK, axis1=-2, axis2=-1) > 0
        lost_G = jnp.sum(jnp.where(present_GxK, 0.0, span.spectrum_GxK), axis=-1)
        return self.with_basis(
            span.finite,
            directions,
            gram=gram_GxKxK,
            spectrum=jnp.where(present_GxK, span.spectrum_GxK, 0.0),
            mean=jnp.where(present_GxK, span.mean_GxK, 0.0),
            discarded=span.discarded_G + lost_G,
        )

    def with_basis(
        self, accept: jax.Array, directions: Sequence[Leaves], **arrays: jax.Array
    ) -> Self:
        """The state with these directions, and what describes them if `accept`."""
        basis = tuple(
            jax.tree.structure(tree).unflatten(new)
            for tree, new in zip(self.basis, directions, strict=True)
        )
        metric, rank_used = pseudo_inverse(arrays["gram"], self.settings.rank_tol)
        described = self.after_refresh(accept, metric=metric, rank_used=rank_used, **arrays)
        return replace(described, basis=basis)


def init_span(
    params: Any,
    rank: int,
    scope: Scope,
    *,
    rule: str,
    rank_tol: float,
    stacked: Stacked,
    dtype: Any,
) -> OgpsaState:
    """A state without a subspace: the identity."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    projected, groups = form_groups(paths_and_leaves, scope, stacked)
    if paths_and_leaves and not groups:
        raise ValueError("params: no floating-point leaf that the scope does not freeze")

    def zeros() -> Any:
        # From the parameters, so that sharding and memory kind carry over; a new one each time,
        # because aliased buffers cannot be donated.
        return treedef.unflatten(
            [
                jnp.zeros_like(leaf, dtype=dtype) if is_projected else MASKED
                for (_, leaf), is_projected in zip(paths_and_leaves, projected, strict=True)
            ]
        )

    count = groups[-1].rows.stop if groups else 0

    def per_group(*trailing: int) -> jax.Array:
        return jnp.zeros((count, *trailing), jnp.float32)

    kind = Settings if groups else NoLeaves  # the latter: all leaves masked, a placeholder
    return OgpsaState(
        basis=tuple(zeros() for _ in range(rank)),
        gram=per_group(rank, rank),
        metric=per_group(rank, rank),
        spectrum=per_group(rank),
        mean=per_group(rank),
        discarded=per_group(),
        **no_figures(count),
        settings=kind(rank, rule, rank_tol, tuple(projected), groups),
    )


class Alignment:
    """Finds a state's projected leaves in any tree shaped like its parameters; puts them back.

    The tree may carry other containers than the parameters did (bare arrays for ``nnx.Param``), and
    may have leaves that the state's wrapper masks.
    """

    def __init__(self, state: OgpsaState, tree: Any, what: str) -> None:
        leaves, treedef = jax.tree.flatten(tree)
        projected = state.settings.projected
        if len(leaves) != len(projected):
            template = jax.tree.structure(state.basis[0], is_leaf=is_masked)
            masks = [is_masked(x) for x in jax.tree.leaves(state.basis[0], is_leaf=is_masked)]
            try:
                leaves = template.flatten_up_to(tree)
            except ValueError as error:
                raise ValueError(
                    f"{what}: expected a tree shaped like the parameters "
                    f"({len(projected)} leaves), got {len(leaves)} leaves: {error}"
                ) from error
            projected, treedef = tuple(not mask for mask in masks), template
        else:
            _check_names(tree, state.basis[0], what)
        self._leaves, self._treedef, self._projected = leaves, treedef, projected
        self.leaves = list(compress(leaves, projected))
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
        """The tree with its projected leaves replaced."""
        new = iter(leaves)
        return self._treedef.unflatten(
            [
                next(new) if is_projected else old
                for old, is_projected in zip(self._leaves, self._projected, strict=True)
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
