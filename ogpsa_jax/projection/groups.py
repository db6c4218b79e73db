"""Groups: which leaves of a pytree share one subspace.

The official code gives every weight tensor a subspace of its own (``scope="tensor"``); the paper's
equations treat all parameters as one vector (``scope="global"``). A leaf that stacks L layers along
an axis stands for L tensors, so in tensor scope it is L groups, kept as one `Group` with an axis.

Everything downstream works on flat lists of leaves, and on *per-group arrays* whose leading axis of
length G counts the groups, every layer of a stacked leaf for one. A `Group` knows its rows there.
"""

import functools
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
    leaves: tuple[int, ...]  # positions in the flat list of the leaves that are held
    axes: tuple[int | None, ...]  # stacking axis of each leaf; all None or none None
    layers: int | None  # length of that axis
    start: int  # first of its rows in per-group arrays

    @property
    def rows(self) -> slice:
        """Its rows in per-group arrays."""
        return slice(self.start, self.start + (1 if self.layers is None else self.layers))

    def of(self, leaves: Sequence[Any]) -> list[Any]:
        """Its leaves out of all that are held."""
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
      For each leaf whether it is held (floating point, not frozen by the scope), and the groups,
      which count the held leaves only.

    Raises:
      ValueError: a leaf that is no array, or complex; one label over leaves that stack different
        numbers of layers.
    """
    held: list[bool] = []
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
        holds = label is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        if holds:
            layers = None if axis is None else leaf.shape[axis]
            members.setdefault(str(label), []).append((sum(held), axis, layers))
        held.append(bool(holds))
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
    return held, tuple(groups)


def inner(a: Sequence[jax.Array], b: Sequence[jax.Array], group: Group) -> jax.Array:
    """⟨a, b⟩ of a group's leaves, accumulated in float32: ``[rows]``.

    Products and a sum, not a dot: contracting a sharded dimension with a dot all-gathers, or is
    refused on explicit meshes; a sum costs one all-reduce of a few numbers.
    """
    total = jnp.zeros(group.rows.stop - group.start, jnp.float32)
    for x, y, axis in zip(a, b, group.axes, strict=True):
        others = tuple(i for i in range(x.ndim) if i != axis)
        products = x.astype(jnp.float32) * y.astype(jnp.float32)
        total = total + jnp.sum(products, axis=others).reshape(total.shape)
    return total


def inner_with_each(
    a: Sequence[jax.Array], directions: Sequence[Sequence[jax.Array]], group: Group
) -> jax.Array:
    """⟨a, direction j⟩ of a group's leaves, each with its k directions: float32 ``[rows, k]``."""
    total = jnp.zeros((group.rows.stop - group.start, len(directions[0])), jnp.float32)
    for x, each, axis in zip(a, directions, group.axes, strict=True):
        if stacks(each):
            stack = jnp.stack(each).astype(jnp.float32)
            others = tuple(i + 1 for i in range(x.ndim) if i != axis)
            sums = jnp.sum(x.astype(jnp.float32)[None] * stack, axis=others)
            total = total + sums.reshape(len(each), -1).T
        else:
            alone = group._replace(axes=(axis,))
            total = total + jnp.stack([inner([x], [y], alone) for y in each], axis=-1)
    return total


def combination(factors: jax.Array, each: Sequence[jax.Array], axis: int | None) -> jax.Array:
    """``Σ_j factors[:, j] · each[j]`` of one leaf, float32; `factors` ``[rows, k]``."""
    ndim = each[0].ndim
    if stacks(each):
        rest = tuple(-1 if i == axis else 1 for i in range(ndim))
        stack = jnp.stack(each).astype(jnp.float32)
        return jnp.sum(factors.T.reshape(len(each), *rest) * stack, axis=0)
    terms = [spread(factors[:, j], ndim, axis) * widened(y) for j, y in enumerate(each)]
    return functools.reduce(jnp.add, terms)


def widened(x: jax.Array) -> jax.Array:
    """`x` in float32; bfloat16 by its bits, which are the upper half of the same float32's.

    A second ``astype`` of what was converted for the coefficients is merged with the first, and
    XLA's CPU backend then keeps the float32 array from one to the other: k copies of the
    parameters, and six times the memory traffic.
    """
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << jnp.uint32(16), jnp.float32)


def stacks(each: Sequence[jax.Array]) -> bool:
    """Whether the directions of a leaf are put into one array before they are used.

    Many of a small leaf: an operation on each, times hundreds of such leaves, compiles slowly. Of a
    large one the copy would cost more than it saves.
    """
    return len(each) > 8 and each[0].size <= 2**17


def spread(rows: jax.Array, ndim: int, axis: int | None) -> jax.Array:
    """A group's rows of a per-group array ``[rows]``, shaped to broadcast against a leaf."""
    return jnp.reshape(rows, tuple(-1 if i == axis else 1 for i in range(ndim)))
