r"""Subspaces of the inputs of layers: second moment → eigenvectors → basis → projection.

For a matrix W ``[in, out]`` the reference subspace is all ``U A`` with U ``[in, r]`` orthonormal,
and the projection ``g ← g − U M (Uᵀ g)``, ``M = (Uᵀ U)⁻¹`` of U as stored. A step that has lost it
changes no output ``xᵀ W`` for an input x in the span of U. U has the leading eigenvectors of the
second moment of the reference inputs, as many as make up the share `energy` of it, at most `rank`.
Columns beyond are zero: shapes never depend on data.

Source: GPM (arXiv 2103.09762), there for whole tasks and plain SGD. ``docs/core.md`` has the same
in a few lines of NumPy.

Names end in shapes: I entries of the input, O of the output, R columns of U,
S columns of a sketch; dots stand for layers in front, G for all layers of all inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import is_masked
from ogpsa_jax.projection.input_state import InputSettings, InputState, flatten_like, needs_metric
from ogpsa_jax.projection.kernels import KernelLeaf
from ogpsa_jax.projection.second_moments import Moments, SecondMoment
from ogpsa_jax.projection.subspace import TINY, eigen, inverse_sqrt
from ogpsa_jax.projection.xla import inverse_root, let_compiler_place, matmul

_HIGHEST = jax.lax.Precision.HIGHEST


def refresh_inputs(state: InputState, moments: Moments) -> InputState:
    """A state whose subspaces are made from `moments`. Jittable.

    Moments that are not finite, in any layer, change nothing and are counted.

    Raises:
      ValueError: moments that are missing, no :class:`SecondMoment`, or of another shape than the
        kernels' inputs.
    """
    settings = state.settings
    if not settings.kernels:
        return state
    _check_moments(settings, moments)
    accept = jnp.array(True)
    for name in settings.groups:
        moment = moments[name]
        finite = jnp.isfinite(jnp.sum(jnp.abs(moment.product))) & jnp.all(
            jnp.isfinite(moment.trace)
        )
        accept = accept & finite
    basis, metric, shares, ranks = {}, {}, [], []
    for name in settings.groups:
        old = state.basis[name]
        make = partial(_span_of_layers, shape=old.shape, dtype=old.dtype, settings=settings)
        like = (old, state.metric[name], None, None)
        basis[name], metric[name], share, rank = let_compiler_place(make, like, moments[name])
        shares.append(share)
        ranks.append(rank)
    return state.after_refresh(
        accept,
        basis=basis,
        metric=metric,
        energy_held=jnp.concatenate(shares),
        rank_used=jnp.concatenate(ranks),
    )


def _check_moments(settings: InputSettings, moments: Moments) -> None:
    if not isinstance(moments, Mapping):
        raise ValueError(f"moments: expected a dict by input, got {type(moments).__name__}")
    for name, kernels in settings.groups.items():
        kernel = kernels[0]
        if name not in moments:
            raise ValueError(
                f"moments: those of {name!r}, which {kernel.name} multiplies, are missing; there "
                f"are {', '.join(map(repr, moments)) or 'none'}"
            )
        if not isinstance(moments[name], SecondMoment):
            raise ValueError(
                f"moments: that of {name!r} is a {type(moments[name]).__name__}; make it with "
                "second_moment(inputs), or collect all with input_moments"
            )
        product, trace = moments[name].product, moments[name].trace
        wanted = (*kernel.layers, kernel.width)
        if product.shape[:-1] != wanted or trace.shape != kernel.layers:
            raise ValueError(
                f"moments: those of {name!r} have shape {product.shape}, but {kernel.name} of "
                f"shape {kernel.shape} calls for {(*wanted, kernel.width)} (a sketch: fewer)"
            )
        if moments[name].seed is None and product.shape[-1] != kernel.width:
            raise ValueError(
                f"moments: those of {name!r} have {product.shape[-1]} columns of {kernel.width} "
                "and no seed, so they are neither whole nor a sketch"
            )


def _span_of_layers(
    moment: SecondMoment, *, shape: tuple[int, ...], dtype: Any, settings: InputSettings
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As :func:`_span_of` for every layer; the two last are float32 and int32 ``[G]``."""
    *layers, _, size = shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(layers) :]), moment)
    # Layer by layer: the eigenvectors of one are all that exists at a time.
    one = partial(_span_of, size=size, settings=settings, dtype=dtype)
    basis, metric, share, rank = jax.lax.map(one, flat)
    return basis.reshape(shape), metric.reshape(*layers, *metric.shape[1:]), share, rank


def _span_of(
    moment: SecondMoment, size: int, settings: InputSettings, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """U ``[in, r]``, its metric, the share it covers, and its rank, of one layer's moment."""
    usable = jnp.isfinite(moment.trace) & (moment.trace > TINY)
    scale = jnp.where(usable, 1.0 / jnp.where(usable, moment.trace, 1.0), 0.0)
    product = jnp.where(usable, moment.product * scale, 0.0)  # of trace one
    values_R, vectors_IxR = _eigenpairs(replace(moment, product=product), size)
    # As many as reach the share; the one that crosses the line is in.
    before_R = jnp.cumsum(values_R) - values_R
    keep_R = (before_R < settings.energy) & (values_R > settings.rank_tol * values_R[0])
    keep_R = keep_R & (values_R > 0)
    kept_IxR = jnp.where(keep_R[None, :], vectors_IxR, 0.0)
    weights_RxR = inverse_root(matmul(kept_IxR.T, kept_IxR)[None])[0]
    basis_IxR = matmul(kept_IxR, weights_RxR).astype(dtype)
    stored_IxR = basis_IxR.astype(jnp.float32)
    gram_RxR = matmul(stored_IxR.T, stored_IxR)
    present_R = jnp.diagonal(gram_RxR) > 0.25
    share = jnp.sum(jnp.where(present_R, values_R, 0.0))
    rank = jnp.sum(present_R, dtype=jnp.int32)
    diagonal_R = present_R.astype(jnp.float32)
    metric = _inverse(gram_RxR, present_R) if needs_metric(dtype) else diagonal_R
    return basis_IxR, metric, share, rank


def _eigenpairs(moment: SecondMoment, size: int) -> tuple[jax.Array, jax.Array]:
    """The leading eigenvalues, largest first, and eigenvectors ``[in, size]`` of one moment."""
    if moment.seed is None:
        values_I, vectors_IxI = (x[0] for x in eigen(moment.product[None]))
        return values_I[:size], vectors_IxI[:, :size]
    # Nyström: A ≈ Y (Ωᵀ Y)⁺ Yᵀ = B Bᵀ, whose left singular vectors are wanted.
    omega_IxS, sketch_IxS = moment.test_matrix(), moment.product
    core_SxS = matmul(omega_IxS.T, sketch_IxS)
    core_values_S, core_vectors_SxS = (x[0] for x in eigen(0.5 * (core_SxS + core_SxS.T)[None]))
    # Y is known to float32's precision, and so is the core.
    safe_S = core_values_S > 1e-6 * core_values_S[0]
    root_S = jnp.where(safe_S, jax.lax.rsqrt(jnp.where(safe_S, core_values_S, 1.0)), 0.0)
    half_IxS = matmul(sketch_IxS, core_vectors_SxS * root_S[None, :])
    values_S, right_SxS = (x[0] for x in eigen(matmul(half_IxS.T, half_IxS)[None]))
    values_S = jnp.maximum(values_S, 0.0)
    vectors_IxS = matmul(half_IxS, right_SxS * inverse_sqrt(values_S)[None, :])
    missing = max(size - values_S.shape[0], 0)
    return (
        jnp.pad(values_S, (0, missing))[:size],
        jnp.pad(vectors_IxS, ((0, 0), (0, missing)))[:, :size],
    )


def _inverse(gram_RxR: jax.Array, present_R: jax.Array) -> jax.Array:
    """Inverse of a nearly unit Gram matrix, zero where a column is absent.

    Newton–Schulz: the error of the start, below .1 for a basis kept in bfloat16, is squared each
    time.
    """
    both_RxR = present_R[:, None] & present_R[None, :]
    identity = jnp.eye(gram_RxR.shape[0], dtype=jnp.float32)
    filled_RxR = jnp.where(both_RxR, gram_RxR, identity)

    def improve(_: int, inverse_RxR: jax.Array) -> jax.Array:
        return matmul(inverse_RxR, 2.0 * identity - matmul(filled_RxR, inverse_RxR))

    return jnp.where(both_RxR, jax.lax.fori_loop(0, 6, improve, identity), 0.0)


def apply_inputs(updates: Any, state: InputState) -> tuple[Any, InputState]:
    """Apply the state's rule to `updates` (without what `others` contains)."""
    if not state.settings.kernels:
        return updates, state
    leaves, treedef = flatten_like(state.settings, updates, "updates")
    out, (squared_norm, in_span, removed) = project_inputs(leaves, state)
    return treedef.unflatten(out), state.after_update(squared_norm, in_span, removed)


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
    energies_3xG: list[jax.Array] = []
    for name, group in settings.groups.items():
        count = math.prod(group[0].layers)
        present = [kernel for kernel in group if not is_masked(leaves[kernel.leaf])]
        if not present:
            energies_3xG.append(jnp.zeros((3, count), jnp.float32))
            continue
        own = [leaves[kernel.leaf] for kernel in present]
        project = partial(_project_layers, kernels=present, rule=settings.rule)
        projected, energies = let_compiler_place(
            project, (own, None), own, state.basis[name], state.metric[name]
        )
        for kernel, leaf in zip(present, projected, strict=True):
            out[kernel.leaf] = leaf
        energies_3xG.append(energies.reshape(count, 3).T)
    if freeze:
        for place in settings.frozen:
            if not is_masked(out[place]):
                out[place] = jnp.zeros_like(out[place])
    return out, jnp.concatenate(energies_3xG, axis=1)


def _project_layers(
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
            return _project_layers(*one, kernels=rest, rule=rule)

        out, energies = jax.lax.map(layer, (moved, basis, metric))
        back = [jnp.moveaxis(x, 0, k.stacked[0]) for x, k in zip(out, kernels, strict=True)]
        return back, energies
    out, energies = [], jnp.zeros(3, jnp.float32)
    for leaf, kernel in zip(leaves, kernels, strict=True):
        result, added = _project_kernel(leaf, kernel, basis, metric, rule)
        out.append(result)
        energies = energies + added
    return out, energies


def _project_kernel(
    leaf: jax.Array, kernel: KernelLeaf, basis_IxR: jax.Array, metric: jax.Array, rule: str
) -> tuple[jax.Array, jax.Array]:
    """One matrix, ``g − U M (Uᵀ g)``, and the squared norms ``[3]`` as of `project_inputs`.

    The input axes stay as they are, for they may be sharded: U takes their shape instead.
    """
    sizes = tuple(leaf.shape[i] for i in kernel.axes)
    wide = leaf.dtype if leaf.dtype == basis_IxR.dtype else jnp.dtype(jnp.float32)
    basis_IxR = basis_IxR.reshape(*sizes, -1).astype(wide)
    contracted = tuple(range(len(sizes)))
    coefficients_RxO = jax.lax.dot_general(
        basis_IxR,
        leaf.astype(wide),
        ((contracted, kernel.axes), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # An infinite gradient times a zero column is not a number: absent columns have no weight.
    diagonal_R = metric if metric.ndim == 1 else jnp.diagonal(metric)
    present_Rx1 = (diagonal_R > 0).reshape(-1, *[1] * (coefficients_RxO.ndim - 1))
    weights_RxO = coefficients_RxO = jnp.where(present_Rx1, coefficients_RxO, 0.0)
    if metric.ndim == 2:
        weights_RxO = jax.lax.dot_general(
            metric, coefficients_RxO, (((1,), (0,)), ((), ())), precision=_HIGHEST
        )
    before = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    in_span = jnp.sum(coefficients_RxO * weights_RxO)
    if rule == "none":
        return leaf, jnp.stack([before, in_span, jnp.zeros_like(before)])
    component_IxO = jax.lax.dot_general(
        basis_IxR.astype(jnp.float32),
        weights_RxO,
        (((len(sizes),), (0,)), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    component = jnp.transpose(component_IxO, _order(kernel))
    if rule == "inplane":
        result, removed = component, jnp.maximum(before - in_span, 0.0)
    else:
        result, removed = leaf.astype(jnp.float32) - component, in_span
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
