"""Groups: which leaves of a pytree share one subspace.

The official code gives every weight tensor a subspace of its own (``scope="tensor"``); the paper's
equations treat all parameters as one vector (``scope="global"``). A leaf that stacks L layers along
an axis stands for L tensors, so in tensor scope it is L groups, kept as one `Group` with an axis.

Everything downstream works on flat lists of leaves, and on *per-group arrays* whose leading axis of
length G counts the groups, every layer of a stacked leaf for one. A `Group` knows its rows there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Scope = str | Callable[[Any, Any], str | None]
"""``"tensor"``, ``"global"``, or ``(path, leaf) -> label``; a label of None freezes the leaf."""

Stacked = Mapping[str, int] | Callable[[Any, Any], int | None] | None
"""Regex (searched in the leaf's path) → stacking axis, or ``(path, leaf) -> axis or None``."""

MASKED = optax.MaskedNode()


def is_masked(node: Any) -> bool:
    """Whether `node` stands for a leaf that is left out."""
    return isinstance(node, optax.MaskedNode)


def key_names(path: Any) -> tuple[str, ...]:
    """A path without the kinds of its containers: an optimizer may use others than the model."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


class Group(NamedTuple):
    """Leaves that share one subspace, or one subspace per layer where they stack layers."""

    label: str
    leaves: tuple[int, ...]  # positions in the flat list of the projected leaves
    axes: tuple[int | None, ...]  # stacking axis of each leaf; all None or none None
    layers: int | None  # length of that axis
    start: int  # first of its rows in per-group arrays

    @property
    def length(self) -> int:
        """How many subspaces it stands for: its layers, or one."""
        return 1 if self.layers is None else self.layers

    @property
    def rows(self) -> slice:
        """Its rows in per-group arrays."""
        return slice(self.start, self.start + self.length)

    def of(self, leaves: Sequence[Any]) -> list[Any]:
        """Its leaves out of all that are projected."""
        return [leaves[i] for i in self.leaves]


def stacking_axis(stacked: Stacked, path: Any, leaf: Any) -> int | None:
    """The axis along which `leaf` stacks layers, or None."""
    if stacked is None:
        return None
    if callable(stacked):
        axis = stacked(path, leaf)
    else:
        name = jax.tree_util.keystr(path)
        axis = next((axis for rule, axis in stacked.items() if re.search(rule, name)), None)
    if axis is None or jnp.ndim(leaf) == 0:
        return None
    if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
        raise ValueError(
            f"stacked: axis {axis} given for {jax.tree_util.keystr(path)}, whose shape is "
            f"{jnp.shape(leaf)}"
        )
    return axis % jnp.ndim(leaf)


def form_groups(
    paths_and_leaves: Sequence[tuple[Any, Any]], scope: Scope, stacked: Stacked
) -> tuple[list[bool], tuple[Group, ...]]:
    """Sort leaves into groups.

    Args:
      paths_and_leaves: as from :func:`jax.tree_util.tree_flatten_with_path`.
      scope: see :data:`Scope`.
      stacked: see :data:`Stacked`; ignored by ``scope="global"``.

    Returns:
      For each leaf whether it is projected (floating point, not frozen by the scope), and the
      groups, which count the projected leaves only.

    Raises:
      ValueError: a leaf that is no array, or complex; one label over leaves that stack different
        numbers of layers.
    """
    projected: list[bool] = []
    members: dict[str, list[tuple[int, int | None, int | None]]] = {}
    for path, leaf in paths_and_leaves:
        name = jax.tree_util.keystr(path)
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"params: {name or 'the tree'} is a {type(leaf).__name__} and no array; give the "
                "arrays alone, as equinox.filter(model, equinox.is_inexact_array) does"
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"params: {name} is complex; OGPSA is defined for real parameters")
        axis = None if scope == "global" else stacking_axis(stacked, path, leaf)
        label = scope(path, leaf) if callable(scope) else "all" if scope == "global" else name
        has_group = label is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        if has_group:
            layers = None if axis is None else leaf.shape[axis]
            members.setdefault(str(label), []).append((sum(projected), axis, layers))
        projected.append(bool(has_group))
    groups: list[Group] = []
    for label, items in members.items():
        leaves, axes, layers = zip(*items, strict=True)
        if len(set(layers)) > 1:
            raise ValueError(
                f"scope: the group {label!r} joins leaves that stack different numbers of layers, "
                f"{', '.join(sorted(map(str, set(layers))))}; give them different labels"
            )
        start = groups[-1].rows.stop if groups else 0
        groups.append(Group(label, leaves, axes, layers[0], start))
    return projected, tuple(groups)


def reduced_axes(ndim: int, axis: int | None, leading: int = 0) -> tuple[int, ...]:
    """The axes of a leaf but `axis`, where `leading` further axes stand before them."""
    return tuple(i + leading for i in range(ndim) if i != axis)


def spread(rows: jax.Array, ndim: int, axis: int | None) -> jax.Array:
    """A group's rows ``[..., L]``, shaped to broadcast against a leaf of `ndim` axes."""
    return rows.reshape(*rows.shape[:-1], *(-1 if i == axis else 1 for i in range(ndim)))
