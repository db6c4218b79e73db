"""References that arrive one at a time, folded into the basis without the others at hand."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.find import replace_states
from ogpsa_jax.projection.groups import inner
from ogpsa_jax.projection.input_state import InputState
from ogpsa_jax.projection.momentum import Momentum, project_first_moments
from ogpsa_jax.projection.refresh import with_basis, with_subspace
from ogpsa_jax.projection.state import Alignment, OgpsaState
from ogpsa_jax.projection.subspace import (
    Leaves,
    Shrunk,
    as_stored,
    combine,
    multiply,
    orthonormalised,
    principal,
    scale_rows,
    shrink,
)


def push_reference(
    opt_state: Any,
    reference: Any,
    *,
    window: int | None = None,
    restart: bool | jax.Array = False,
    project_momentum: Momentum = False,
) -> Any:
    r"""Fold one reference gradient into the basis. Pure and jittable.

    For References that come with every step, or are too many to hold at once: beside the
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
    kept = jnp.where(restart, 0.0, 1.0)
    push = partial(_pushed, reference=reference, window=window, kept=kept)
    opt_state = replace_states(opt_state, push)
    return project_first_moments(opt_state, project_momentum)


def _pushed(state: Any, reference: Any, window: int | None, kept: jax.Array) -> Any:
    if isinstance(state, InputState):
        if state.others is None:
            return state
        return replace(state, others=_pushed(state.others, reference, window, kept))
    groups = state.settings.groups
    held = Alignment(state, reference, "reference").leaves
    shrunk = shrink([leaf[None] for leaf in held], groups)
    if window is not None and window <= state.settings.rank:
        unit = combine(shrunk.factors[:, :, None], shrunk.vectors, groups)
        square = shrunk.factors[:, 0] ** 2 * shrunk.gram[:, 0, 0]
        return _windowed(state, [leaf[0] for leaf in unit], square, window, kept, shrunk.finite)
    decay = kept if window is None else kept * (1.0 - 1.0 / window)
    return _decayed(state, shrunk, decay)


def _windowed(
    state: OgpsaState,
    vector: Leaves,
    square: jax.Array,
    window: int,
    kept: jax.Array,
    accept: jax.Array,
) -> OgpsaState:
    """The newest first, then the `window` − 1 before it, then zeros.

    `square` is the squared norm of `vector` ``[G]``, which is measured again only where it is
    rounded to be stored.
    """
    directions, rest = state.directions(), state.settings.rank - window
    newest = as_stored(vector, [old.dtype for old in directions[0]])
    older = [
        [jnp.where(kept > 0, x, jnp.zeros_like(x)) for x in d] for d in directions[: window - 1]
    ]
    zeros = [[jnp.zeros_like(x) for x in newest] for _ in range(rest)]
    if all(new.dtype == leaf.dtype for new, leaf in zip(newest, vector, strict=True)):
        overlaps = square[:, None]
    else:
        overlaps = _overlaps(newest, [newest], state)
    if older:
        overlaps = jnp.concatenate([overlaps, _overlaps(newest, older, state)], axis=1)
    before = kept * state.gram[:, : window - 1, : window - 1]
    below = jnp.concatenate([overlaps[:, 1:, None], before], axis=2)
    squares = jnp.concatenate([overlaps[:, None, :], below], axis=1)
    pushed = (overlaps[:, :1] > 0).astype(jnp.float32)

    def shifted(array: jax.Array) -> jax.Array:
        return jnp.pad(
            jnp.concatenate([pushed, kept * array[:, : window - 1]], axis=1), [(0, 0), (0, rest)]
        )

    return with_basis(
        state,
        accept,
        directions=[newest, *older, *zeros],
        gram=jnp.pad(squares, [(0, 0), (0, rest), (0, rest)]),
        spectrum=shifted(state.spectrum),
        mean=shifted(state.mean),
        discarded=jnp.zeros_like(state.discarded),
    )


def _decayed(state: OgpsaState, shrunk: Shrunk, decay: jax.Array) -> OgpsaState:
    """The principal directions of what the basis stands for, decayed, and the new reference."""
    settings, directions = state.settings, state.directions()
    vector, unit = [leaf[0] for leaf in shrunk.vectors], shrunk.factors
    new = (unit > 0).astype(jnp.float32)  # [G, 1]
    overlaps = unit * _overlaps(vector, directions, state)  # [G, k]
    upper = jnp.concatenate([state.gram, overlaps[:, :, None]], axis=2)
    last = jnp.concatenate([overlaps, new], axis=1)
    squares = jnp.concatenate([upper, last[:, None, :]], axis=1)  # of the basis and the reference
    weights = jnp.sqrt(jnp.concatenate([decay * state.spectrum, new], axis=1))
    found = principal(
        squares * weights[:, :, None] * weights[:, None, :], settings.rank, settings.rank_tol
    )
    turn = weights[:, :, None] * found.vectors
    lengths = jnp.pad(unit, [(0, 0), (settings.rank, 0)], constant_values=1.0)  # [G, k + 1]
    rows = [[*basis, leaf] for *basis, leaf in zip(*directions, vector, strict=True)]
    made = combine(scale_rows(lengths, turn), rows, settings.groups)
    basis = orthonormalised(made, settings.groups)
    total = jnp.concatenate([decay * state.mean, new], axis=1)
    mean = jnp.sum(multiply(jnp.swapaxes(turn, 1, 2), squares) * total[:, None, :], axis=-1)
    return with_subspace(
        state,
        shrunk.finite,
        basis,
        spectrum=found.spectrum,
        mean=mean,
        discarded=decay * state.discarded + found.discarded,
    )


def _overlaps(vector: Leaves, others: Sequence[Leaves], state: OgpsaState) -> jax.Array:
    """⟨vector, other⟩ for each of the others: float32 ``[G, len(others)]``."""
    return jnp.concatenate(
        [
            jnp.stack([inner(g.of(vector), g.of(other), g) for other in others], axis=-1)
            for g in state.settings.groups
        ]
    )
