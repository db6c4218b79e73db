"""Which leaves are matrices of layers, and which of their axes meet the layer's input."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import is_masked, key_names


class Kernel(NamedTuple):
    """How a leaf is a matrix ``[in, out]``, or a stack of them.

    Attributes:
      inputs: name of what it multiplies. Kernels of one name share one subspace (the query, key and
        value projections of a layer do). None: the leaf's own path, as in ``"Dense_0/kernel"``.
      axes: its input axes, one or more (an output projection ``[heads, head_dim, embed]`` has two).
      stacked: axes along which it stacks layers (or experts), each of which has its own inputs. The
        axes that are left are its outputs.
    """

    inputs: str | None = None
    axes: tuple[int, ...] = (-2,)
    stacked: tuple[int, ...] = ()


Kernels = Mapping[str, Kernel] | Callable[[Any, Any], Kernel | None]
"""Regex (searched in the leaf's path) → Kernel, or ``(path, leaf) -> Kernel or None``."""


class KernelLeaf(NamedTuple):
    """A :class:`Kernel` of a tree; hashable."""

    name: str  # path of the leaf, as JAX prints it
    path: tuple[str, ...]  # the same, without the kinds of its containers
    leaf: int  # its place among the tree's leaves, those that are masked included
    inputs: str
    shape: tuple[int, ...]
    stacked: tuple[int, ...]  # axes, none negative
    axes: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Lengths of the stacked axes."""
        return tuple(self.shape[i] for i in self.stacked)

    @property
    def width(self) -> int:
        """Size of its input."""
        return math.prod(self.shape[i] for i in self.axes)


def flax_kernels(path: Any, leaf: Any) -> Kernel | None:
    """Flax's dense layers: two axes, ``[in, out]``, and a path that ends in ``kernel``."""
    return Kernel() if _plain(path)[-1:] == ["kernel"] and jnp.ndim(leaf) == 2 else None


def _plain(path: Any) -> list[str]:
    """A path without the fields in which modules keep a parameter's array."""
    return [name for name in key_names(path) if name not in ("value", "raw_value")]


def find_kernels(
    paths_and_leaves: Sequence[tuple[Any, Any]], kernels: Kernels
) -> tuple[KernelLeaf, ...]:
    """The leaves that are matrices.

    Args:
      paths_and_leaves: as from :func:`jax.tree_util.tree_flatten_with_path`, perhaps with masked
        leaves.
      kernels: see :data:`Kernels`.

    Raises:
      ValueError: no such leaf, axes that a leaf does not have, or kernels that share inputs of
        different sizes.
    """
    found: list[KernelLeaf] = []
    for place, (path, leaf) in enumerate(paths_and_leaves):
        if is_masked(leaf):
            continue
        name = jax.tree_util.keystr(path)
        if callable(kernels):
            kernel = kernels(path, leaf)
        else:
            kernel = next((k for rule, k in kernels.items() if re.search(rule, name)), None)
        if kernel is None:
            continue
        found.append(_checked(path, place, leaf, kernel))
    if not found:
        raise ValueError(
            "kernels: no leaf of the parameters is a matrix by this rule; the leaves are "
            f"{', '.join(jax.tree_util.keystr(path) for path, _ in paths_and_leaves[:8])}..."
        )
    for one in found:
        first = next(other for other in found if other.inputs == one.inputs)
        if (first.layers, first.width) != (one.layers, one.width):
            raise ValueError(
                f"kernels: {first.name} and {one.name} are both said to multiply "
                f"{one.inputs!r}, but have inputs of sizes {(*first.layers, first.width)} and "
                f"{(*one.layers, one.width)}; give them different names"
            )
    return tuple(found)


def _checked(path: Any, place: int, leaf: Any, kernel: Kernel) -> KernelLeaf:
    name, ndim = jax.tree_util.keystr(path), jnp.ndim(leaf)
    count = len(kernel.stacked)
    given = (*kernel.stacked, *kernel.axes)
    if any(not -ndim <= axis < ndim for axis in given):
        raise ValueError(f"kernels: axes {given} given for {name}, whose shape is {leaf.shape}")
    axes = [axis % ndim for axis in given]
    outputs = tuple(axis for axis in range(ndim) if axis not in axes)
    if len(set(axes)) < len(axes) or not kernel.axes or not outputs:
        raise ValueError(
            f"kernels: {name} of shape {leaf.shape} needs an input axis, an output axis and no "
            f"axis twice, got stacked {kernel.stacked} and inputs {kernel.axes}"
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(f"kernels: {name} is {leaf.dtype}; matrices of real numbers were expected")
    return KernelLeaf(
        name=name,
        path=key_names(path),
        leaf=place,
        inputs="/".join(_plain(path)) if kernel.inputs is None else kernel.inputs,
        shape=tuple(leaf.shape),
        stacked=tuple(axes[:count]),
        axes=tuple(axes[count:]),
        outputs=outputs,
    )


def as_matrices(leaf: jax.Array, kernel: KernelLeaf) -> jax.Array:
    """A kernel's leaf as ``[..., in, out]``, layers in front."""
    moved = jnp.transpose(leaf, (*kernel.stacked, *kernel.axes, *kernel.outputs))
    return moved.reshape(*kernel.layers, kernel.width, -1)
