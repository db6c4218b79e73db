"""References that arrive one at a time, folded into the basis without the others at hand."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection import xla
from ogpsa_jax.projection.find import replace_states
from ogpsa_jax.projection.input_state import InputState
from ogpsa_jax.projection.momentum import Momentum, project_first_moments
from ogpsa_jax.projection.state import Alignment, OgpsaState
from ogpsa_jax.projection.subspace import (
    Scaled,
    Span,
    combine,
    inner,
    inner_with_each,
    principal,
    scale_references,
)
from ogpsa_jax.projection.xla import matmul


def push_reference(
    opt_state: Any,
    reference: Any,
    *,
    window: int | None = None,
    restart: bool | jax.Array = False,
    project_momentum: Momentum = False,
) -> Any:
    r"""Fold one reference gradient into the basis. Pure and jittable.

    For References that come with every step, or are too many for the memory: beside the
    state only this one is needed. With rank k and window w the basis is

    * for :math:`w \le k`: the last w references themselves, exactly, for k inner products a push
      (a basis left by :func:`ogpsa_jax.refresh` fades out direction by direction);
    * for :math:`w > k`, or None for no forgetting: the principal directions of the decaying sum
      :math:`A_t = (1 - 1/w) A_{t-1} + u_t u_t^\top` of unit references u, each push exact at rank
      k + 1 and truncated to k. With :math:`\delta_t` the energy that a truncation drops, the energy
      of the references outside the basis, :math:`\operatorname{tr}((I - P) A_T)`, is at most
      :math:`\sum_t (1 - 1/w)^{T-t} \delta_t`. The state counts that sum as ``discarded``, and
      ``reference_coverage`` of :func:`ogpsa_jax.diagnostics` is made from it. Nothing is lost where
      the references span no more than k dimensions.

    Args:
      opt_state: as for :func:`ogpsa_jax.refresh`.
      reference: one gradient, a pytree like the parameters, any float dtypes.
      window: how many references the basis remembers; None: all since the last restart.
      restart: forget everything before this reference.
      project_momentum: as for :func:`ogpsa_jax.refresh`.

    Returns:
      The new optimizer state; unchanged but for a count if the reference is not finite.

    Raises:
      ValueError: `window` below 1, no :class:`OgpsaState`, or a reference of another shape.

    Examples:
      >>> import functools, jax, jax.numpy as jnp
      >>> from ogpsa_jax import diagnostics, ogpsa_project, push_reference
      >>> params = jnp.zeros(3)
      >>> push = jax.jit(functools.partial(push_reference, window=2))
      >>> state = ogpsa_project(rank=2).init(params)
      >>> for reference in jnp.eye(3):
      ...     state = push(state, reference)
      >>> [[float(x) for x in direction] for direction in state.basis]  # the last two
      [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, got {window}")
    keep = jnp.where(restart, 0.0, 1.0)
    push = partial(_pushed, reference=reference, window=window, keep=keep)
    opt_state = replace_states(opt_state, push)
    return project_first_moments(opt_state, project_momentum)


def _pushed(state: Any, reference: Any, window: int | None, keep: jax.Array) -> Any:
    if isinstance(state, InputState):
        if state.others is None:
            return state
        return replace(state, others=_pushed(state.others, reference, window, keep))
    groups = state.settings.groups
    reference_N = Alignment(state, reference, "reference").leaves
    scaled = scale_references([leaf[None] for leaf in reference_N], groups)
    if window is not None and window <= state.settings.rank:
        return _windowed(state, scaled, window, keep)
    decay = keep if window is None else keep * (1.0 - 1.0 / window)
    return state.with_span(_decayed(state, scaled, decay))


def _windowed(state: OgpsaState, scaled: Scaled, window: int, keep: jax.Array) -> OgpsaState:
    """The newest reference first, then the `window` − 1 before it, then zeros."""
    groups, directions = state.settings.groups, state.directions()
    rest = state.settings.rank - window
    unit_1xN = combine(scaled.inverse_norms_GxM[:, :, None], scaled.references_MxN, groups)
    unit_N = [leaf[0] for leaf in unit_1xN]
    newest_N = state.stored(unit_N)
    if all(new.dtype == leaf.dtype for new, leaf in zip(newest_N, unit_N, strict=True)):
        norm_squared_G = scaled.inverse_norms_GxM[:, 0] ** 2 * scaled.gram_GxMxM[:, 0, 0]
    else:  # measured again, as it is rounded
        norm_squared_G = inner(newest_N, newest_N, groups)
    older = [
        [jnp.where(keep > 0, x, jnp.zeros_like(x)) for x in d] for d in directions[: window - 1]
    ]
    zeros = [[jnp.zeros_like(x) for x in newest_N] for _ in range(rest)]
    overlaps_GxW = norm_squared_G[:, None]
    if older:
        overlaps_GxW = jnp.concatenate(
            [overlaps_GxW, inner_with_each(newest_N, older, groups)], axis=1
        )
    before_GxWxW = keep * state.gram[:, : window - 1, : window - 1]
    below_GxWxW = jnp.concatenate([overlaps_GxW[:, 1:, None], before_GxWxW], axis=2)
    gram_GxWxW = jnp.concatenate([overlaps_GxW[:, None, :], below_GxWxW], axis=1)
    pushed_Gx1 = (overlaps_GxW[:, :1] > 0).astype(jnp.float32)

    def shifted(array_GxK: jax.Array) -> jax.Array:
        last_GxW = jnp.concatenate([pushed_Gx1, keep * array_GxK[:, : window - 1]], axis=1)
        return jnp.pad(last_GxW, [(0, 0), (0, rest)])

    choose = partial(jnp.where, scaled.finite)
    return state.with_basis(
        scaled.finite,
        jax.tree.map(choose, [newest_N, *older, *zeros], state.directions()),
        gram=jnp.pad(gram_GxWxW, [(0, 0), (0, rest), (0, rest)]),
        spectrum=shifted(state.spectrum),
        mean=shifted(state.mean),
        discarded=jnp.zeros_like(state.discarded),
    )


def _decayed(state: OgpsaState, scaled: Scaled, decay: jax.Array) -> Span:
    """The principal directions of what the basis stands for, decayed, and the new reference.

    J counts both: the K directions and the reference.
    """
    settings, directions = state.settings, state.directions()
    reference_N = [leaf[0] for leaf in scaled.references_MxN]
    inverse_norm_Gx1 = scaled.inverse_norms_GxM
    new_Gx1 = (inverse_norm_Gx1 > 0).astype(jnp.float32)
    overlaps_GxK = inverse_norm_Gx1 * inner_with_each(reference_N, directions, settings.groups)
    upper_GxKxJ = jnp.concatenate([state.gram, overlaps_GxK[:, :, None]], axis=2)
    last_GxJ = jnp.concatenate([overlaps_GxK, new_Gx1], axis=1)
    gram_GxJxJ = jnp.concatenate([upper_GxKxJ, last_GxJ[:, None, :]], axis=1)
    lengths_GxJ = jnp.sqrt(jnp.concatenate([decay * state.spectrum, new_Gx1], axis=1))
    weighted_gram_GxJxJ = gram_GxJxJ * lengths_GxJ[:, :, None] * lengths_GxJ[:, None, :]
    pairs = principal(weighted_gram_GxJxJ, settings.rank, settings.rank_tol)
    weights_GxJxK = lengths_GxJ[:, :, None] * pairs.weights_GxMxK
    unit_factors_GxJ = jnp.pad(inverse_norm_Gx1, [(0, 0), (settings.rank, 0)], constant_values=1.0)
    vectors_JxN = [[*leaf, new] for *leaf, new in zip(*directions, reference_N, strict=True)]
    scaled_weights_GxJxK = xla.scale_rows(unit_factors_GxJ, weights_GxJxK)
    total_GxJ = jnp.concatenate([decay * state.mean, new_Gx1], axis=1)
    in_basis_GxKxJ = matmul(jnp.swapaxes(weights_GxJxK, 1, 2), gram_GxJxJ)
    return Span(
        scaled_weights_GxJxK,
        vectors_JxN,
        pairs.spectrum_GxK,
        mean_GxK=jnp.sum(in_basis_GxKxJ * total_GxJ[:, None, :], axis=-1),
        discarded_G=decay * state.discarded + pairs.discarded_G,
        finite=scaled.finite,
    )
