"""The subspace of a layer's inputs: leading eigenvectors of their second moment, or its sketch."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.input_state import InputSettings, InputState, needs_metric
from ogpsa_jax.projection.meshes import let_compiler_place
from ogpsa_jax.projection.second_moments import Moments, SecondMoment
from ogpsa_jax.projection.subspace import eigen, inverse_root, multiply

_TINY = 2.0**-112


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
    basis, metric, held, ranks = {}, {}, [], []
    for name in settings.groups:
        old = state.basis[name]
        make = partial(_subspaces, shape=old.shape, dtype=old.dtype, settings=settings)
        like = (old, state.metric[name], None, None)
        basis[name], metric[name], share, rank = let_compiler_place(make, like, moments[name])
        held.append(share)
        ranks.append(rank)
    return state.after_refresh(
        accept,
        basis=basis,
        metric=metric,
        energy_held=jnp.concatenate(held),
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


def _subspaces(
    moment: SecondMoment, *, shape: tuple[int, ...], dtype: Any, settings: InputSettings
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As :func:`_subspace` for every layer; the two last are float32 and int32 ``[G]``."""
    *layers, _, size = shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(layers) :]), moment)
    # Layer by layer: the eigenvectors of one are all that exists at a time.
    one = partial(_subspace, size=size, settings=settings, dtype=dtype)
    basis, metric, share, rank = jax.lax.map(one, flat)
    return basis.reshape(shape), metric.reshape(*layers, *metric.shape[1:]), share, rank


def _subspace(
    moment: SecondMoment, size: int, settings: InputSettings, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """U ``[in, r]``, its metric, the share it holds, and its rank, of one layer's moment."""
    usable = jnp.isfinite(moment.trace) & (moment.trace > _TINY)
    scale = jnp.where(usable, 1.0 / jnp.where(usable, moment.trace, 1.0), 0.0)
    product = jnp.where(usable, moment.product * scale, 0.0)  # of trace one
    values, vectors = _eigenpairs(replace(moment, product=product), size)
    # As many as reach the share; the one that crosses the line is in.
    before = jnp.cumsum(values) - values
    keep = (before < settings.energy) & (values > settings.rank_tol * values[0]) & (values > 0)
    kept = jnp.where(keep[None, :], vectors, 0.0)
    turn = inverse_root(multiply(kept.T, kept)[None])[0]
    basis_IxR = multiply(kept, turn).astype(dtype)
    stored = basis_IxR.astype(jnp.float32)
    gram_RxR = multiply(stored.T, stored)
    present = jnp.diagonal(gram_RxR) > 0.25
    share = jnp.sum(jnp.where(present, values, 0.0))
    rank = jnp.sum(present, dtype=jnp.int32)
    metric = _inverse(gram_RxR, present) if needs_metric(dtype) else present.astype(jnp.float32)
    return basis_IxR, metric, share, rank


def _eigenpairs(moment: SecondMoment, size: int) -> tuple[jax.Array, jax.Array]:
    """The leading eigenvalues, largest first, and eigenvectors ``[in, size]`` of one moment."""
    if moment.seed is None:
        values, vectors = eigen(moment.product[None])
        return values[0, :size], vectors[0, :, :size]
    # Nyström: A ≈ Y (Ωᵀ Y)⁺ Yᵀ = B Bᵀ, whose left singular vectors are wanted.
    omega_IxS, sketch_IxS = moment.test_matrix(), moment.product
    core = multiply(omega_IxS.T, sketch_IxS)
    lengths, turn = eigen(0.5 * (core + core.T)[None])
    # Y is known to float32's precision, and so is the core.
    safe = lengths[0] > 1e-6 * lengths[0, 0]
    root = jnp.where(safe, jax.lax.rsqrt(jnp.where(safe, lengths[0], 1.0)), 0.0)
    half_IxS = multiply(sketch_IxS, turn[0] * root[None, :])
    values, right = eigen(multiply(half_IxS.T, half_IxS)[None])
    values = jnp.maximum(values[0], 0.0)
    inverse = jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1.0)), 0.0)
    vectors = multiply(half_IxS, right[0] * inverse[None, :])
    missing = max(size - values.shape[0], 0)
    return (
        jnp.pad(values, (0, missing))[:size],
        jnp.pad(vectors, ((0, 0), (0, missing)))[:, :size],
    )


def _inverse(gram: jax.Array, present: jax.Array) -> jax.Array:
    """Inverse of a nearly unit Gram matrix ``[r, r]``, zero where a column is absent.

    Newton–Schulz: the error of the start, below .1 for a basis kept in bfloat16, is squared each
    time.
    """
    both = present[:, None] & present[None, :]
    identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
    filled = jnp.where(both, gram, identity)

    def improve(_: int, inverse: jax.Array) -> jax.Array:
        return multiply(inverse, 2.0 * identity - multiply(filled, inverse))

    return jnp.where(both, jax.lax.fori_loop(0, 6, improve, identity), 0.0)
