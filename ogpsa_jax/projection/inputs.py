r"""Subspaces of the inputs of layers: a basis of r columns where a gradient basis needs matrices.

For a matrix W ``[in, out]`` the reference subspace is all ``U A`` with U ``[in, r]`` orthonormal,
and the projection ``g ← g − U M (Uᵀ g)``, ``M = (Uᵀ U)⁻¹`` of U as stored. A step that has lost it
changes no output ``xᵀ W`` for an input x in the span of U. U holds the leading eigenvectors of the
second moment of the reference inputs, as many as make up the share `energy` of it, at most `rank`.
Columns beyond are zero: shapes never depend on data.

Source: GPM (arXiv 2103.09762), there for whole tasks and plain SGD.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import is_masked
from ogpsa_jax.projection.input_state import InputState, flatten_like
from ogpsa_jax.projection.kernels import KernelLeaf
from ogpsa_jax.projection.meshes import let_compiler_place

_HIGHEST = jax.lax.Precision.HIGHEST


def project_inputs(
    leaves: Sequence[Any], state: InputState, *, freeze: bool = True
) -> tuple[list[Any], jax.Array]:
    """Apply the state's rule to the leaves of a gradient, an update or a moment.

    Args:
      leaves: all leaves of the tree, those that are masked included; kernels that are masked stay
        as they are.
      state: the subspaces.
      freeze: also zero the leaves that are frozen.

    Returns:
      The leaves after the rule, in their own dtypes, and float32 ``[3, G]``: the squared norms
      before the rule, in the span, and removed.
    """
    settings, out = state.settings, list(leaves)
    energies: list[jax.Array] = []
    for name, group in settings.groups.items():
        count = math.prod(group[0].layers)
        there = [kernel for kernel in group if not is_masked(leaves[kernel.leaf])]
        if not there:
            energies.append(jnp.zeros((3, count), jnp.float32))
            continue
        own = [leaves[kernel.leaf] for kernel in there]
        project = partial(_project_group, kernels=there, rule=settings.rule)
        projected, found = let_compiler_place(
            project, (own, None), own, state.basis[name], state.metric[name]
        )
        for kernel, leaf in zip(there, projected, strict=True):
            out[kernel.leaf] = leaf
        energies.append(found.reshape(count, 3).T)
    if freeze:
        for place in settings.frozen:
            if not is_masked(out[place]):
                out[place] = jnp.zeros_like(out[place])
    return out, jnp.concatenate(energies, axis=1)


def _project_group(
    leaves: Sequence[jax.Array],
    basis: jax.Array,
    metric: jax.Array,
    *,
    kernels: Sequence[KernelLeaf],
    rule: str,
) -> tuple[list[jax.Array], jax.Array]:
    """Kernels that share inputs, so that each layer's U is gathered once, and for that layer only.

    Returns the leaves and float32 ``[..., 3]``: the squared norms before, in the span, and removed.
    """
    if kernels[0].stacked:
        moved = [jnp.moveaxis(x, k.stacked[0], 0) for x, k in zip(leaves, kernels, strict=True)]
        rest = [_without(kernel, kernel.stacked[0]) for kernel in kernels]

        def layer(one: tuple[Any, ...]) -> tuple[list[jax.Array], jax.Array]:
            return _project_group(*one, kernels=rest, rule=rule)

        out, energies = jax.lax.map(layer, (moved, basis, metric))
        back = [jnp.moveaxis(x, 0, k.stacked[0]) for x, k in zip(out, kernels, strict=True)]
        return back, energies
    out, energies = [], jnp.zeros(3, jnp.float32)
    for leaf, kernel in zip(leaves, kernels, strict=True):
        result, found = _project_one(leaf, kernel, basis, metric, rule)
        out.append(result)
        energies = energies + found
    return out, energies


def _project_one(
    leaf: jax.Array, kernel: KernelLeaf, basis: jax.Array, metric: jax.Array, rule: str
) -> tuple[jax.Array, jax.Array]:
    # The input axes stay as they are, for they may be sharded: U takes their shape instead.
    sizes = tuple(leaf.shape[i] for i in kernel.axes)
    wide = leaf.dtype if leaf.dtype == basis.dtype else jnp.dtype(jnp.float32)
    u = basis.reshape(*sizes, -1).astype(wide)
    over = tuple(range(len(sizes)))
    coefficients = jax.lax.dot_general(  # [r, out...]
        u,
        leaf.astype(wide),
        ((over, kernel.axes), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # An infinite gradient times a zero column is not a number: absent columns have no weight.
    diagonal = metric if metric.ndim == 1 else jnp.diagonal(metric)
    present = (diagonal > 0).reshape(-1, *[1] * (coefficients.ndim - 1))
    weights = coefficients = jnp.where(present, coefficients, 0.0)
    if metric.ndim == 2:
        weights = jax.lax.dot_general(
            metric, coefficients, (((1,), (0,)), ((), ())), precision=_HIGHEST
        )
    before = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    in_span = jnp.sum(coefficients * weights)
    if rule == "none":
        return leaf, jnp.stack([before, in_span, jnp.zeros_like(before)])
    component = jax.lax.dot_general(  # [in..., out...]
        u.astype(jnp.float32),
        weights,
        (((len(sizes),), (0,)), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    component = jnp.transpose(component, _order(kernel))
    keep_component = rule == "inplane"
    result = component if keep_component else leaf.astype(jnp.float32) - component
    removed = jnp.maximum(before - in_span, 0.0) if keep_component else in_span
    return result.astype(leaf.dtype), jnp.stack([before, in_span, removed])


def _order(kernel: KernelLeaf) -> tuple[int, ...]:
    """The permutation from (inputs, outputs) back to a leaf's own axes."""
    axes = (*kernel.axes, *kernel.outputs)
    return tuple(axes.index(i) for i in range(len(axes)))


def _without(kernel: KernelLeaf, axis: int) -> KernelLeaf:
    """The kernel of one layer: `axis` is gone."""

    def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - (i > axis) for i in axes if i != axis)

    return kernel._replace(
        shape=kernel.shape[:axis] + kernel.shape[axis + 1 :],
        stacked=shifted(kernel.stacked),
        axes=shifted(kernel.axes),
        outputs=shifted(kernel.outputs),
    )


def apply_inputs(updates: Any, state: InputState) -> tuple[Any, InputState]:
    """Apply the state's rule to `updates` (without what `others` holds)."""
    if not state.settings.kernels:
        return updates, state
    leaves, treedef = flatten_like(state.settings, updates, "updates")
    out, (squared_norm, in_span, removed) = project_inputs(leaves, state)
    return treedef.unflatten(out), state.after_update(squared_norm, in_span, removed)
