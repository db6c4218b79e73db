"""Replacing the basis: pure functions of the optimizer state, whatever wraps ours.

References passed through ``update`` instead would silently be dropped by ``MultiSteps`` and refused
by ``partition``; a basis made inside ``update`` would cost its temporaries at every step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.find import find_states, replace_states
from ogpsa_jax.projection.input_basis import refresh_inputs
from ogpsa_jax.projection.input_state import InputState, flatten_like
from ogpsa_jax.projection.inputs import project_inputs
from ogpsa_jax.projection.momentum import Momentum, project_first_moments
from ogpsa_jax.projection.reference import as_list
from ogpsa_jax.projection.second_moments import Moments
from ogpsa_jax.projection.state import Alignment, OgpsaState
from ogpsa_jax.projection.subspace import (
    Leaves,
    as_stored,
    combine,
    gram,
    orthonormalised,
    principal,
    pseudo_inverse,
    scale_rows,
    shrink,
)


def refresh(
    opt_state: Any,
    references: Sequence[Any] | None = None,
    *,
    moments: Moments | None = None,
    project_momentum: Momentum = False,
) -> Any:
    """Span the basis anew with reference gradients, or moments. Pure and jittable.

    Args:
      opt_state: any Optax state, ``TrainState`` or pytree with an :class:`OgpsaState` inside
        (``chain``, ``MultiSteps``, ``masked``, ``partition``, ``inject_hyperparams``, ...).
      references: m gradients, pytrees like the parameters, any float dtypes. More than the rank:
        their principal directions are kept; fewer: the other directions are zero. None where
        every subspace is one of inputs.
      moments: for subspaces of inputs: second moments by input, from
        :func:`ogpsa_jax.input_moments` or :func:`ogpsa_jax.gradient_moments`.
      project_momentum: also project every first moment found with the new basis: whatever the
        optimizer adds up with gradients. Off reproduces the paper; on takes out what a first
        moment carries along the old basis, which at high learning rates undoes the projection.
        How many leaves it found, `diagnostics` tells. A mapping, regex → bool, says of paths in
        the state whether they are first moments, and stands for True otherwise.

    Returns:
      The new optimizer state. References or moments that are not finite change nothing and are
      counted in ``refused_refreshes``.

    Raises:
      ValueError: no reference, no list of them, no state of ours, a reference of another shape,
        moments that are missing or of another shape, or nothing that takes what is given; and with
        `project_momentum` where some moment cannot be found or projected (the optimizer's state
        is not known, or its steps do not come from moments alone, as those of GaLore, COCOB,
        MADGRAD, L-BFGS, schedule-free and Mechanic, SAM, and lookahead).

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from ogpsa_jax import ogpsa_project, refresh
      >>> params = {"w": jnp.zeros(3)}
      >>> tx = optax.MultiSteps(optax.chain(ogpsa_project(rank=2), optax.sgd(0.1)), 4)
      >>> references = [{"w": jnp.array([0.0, 2.0, 0.0])}, {"w": jnp.array([0.0, -1.0, 0.0])}]
      >>> state = jax.jit(refresh)(tx.init(params), references)
      >>> [int(rank) for rank in state.inner_opt_state[0].rank_used]  # they are parallel
      [1]

    References:
      Sun et al., `Safety Alignment as Continual Learning
      <https://arxiv.org/abs/2602.07892>`_, 2026.
    """
    if references is None and moments is None:
        raise ValueError("references: expected reference gradients, or moments=, got neither")
    if references is not None:
        references = as_list(references, "references", "reference gradient")
    states = find_states(opt_state)
    _check_taken(states, references is not None, moments is not None)
    change = partial(_anew, references=references, moments=moments)
    opt_state = replace_states(opt_state, change)
    return project_first_moments(opt_state, project_momentum)


def _check_taken(states: Sequence[Any], references: bool, moments: bool) -> None:
    """Refuse what no state takes, and leaving a state without what it takes."""
    inputs = [state for state in states if isinstance(state, InputState)]
    spans = [s for s in states if not isinstance(s, InputState)] + [s for s in inputs if s.others]
    if moments and not inputs:
        raise ValueError("moments: no subspace of inputs here; ogpsa_project(subspace='inputs')?")
    if references and not spans:
        raise ValueError("references: every subspace here is one of inputs; pass moments=")
    if not moments and not spans:
        raise ValueError("moments: every subspace here is one of inputs, and none are given")


def _anew(
    state: OgpsaState | InputState, references: Sequence[Any] | None, moments: Moments | None
) -> OgpsaState | InputState:
    if isinstance(state, InputState):
        if moments is not None:
            state = refresh_inputs(state, moments)
        if references is not None and state.others is not None:
            state = replace(state, others=_refreshed(state.others, references))
        return state
    return state if references is None else _refreshed(state, references)


def _refreshed(state: OgpsaState, references: Sequence[Any]) -> OgpsaState:
    settings = state.settings
    held = [Alignment(state, tree, "references").leaves for tree in references]
    shrunk = shrink(
        [jnp.stack([x.astype(jnp.float32) for x in parts]) for parts in zip(*held, strict=True)],
        settings.groups,
    )
    units = shrunk.factors
    squares = shrunk.gram * units[:, :, None] * units[:, None, :]
    found = principal(squares, settings.rank, settings.rank_tol)
    # From the references as they came, so that nothing of their size outlives the Gram matrices.
    turn = scale_rows(shrunk.scale * units, found.vectors)
    made = combine(turn, list(zip(*held, strict=True)), settings.groups)
    basis = orthonormalised(made, settings.groups)
    total = jnp.sum(squares, axis=-1)  # ⟨reference i, sum of the references⟩
    return with_subspace(
        state,
        shrunk.finite,
        basis,
        spectrum=found.spectrum,
        mean=jnp.sum(found.vectors * total[:, :, None], axis=1),
        discarded=found.discarded,
    )


def project_parameters(opt_state: Any, params: Any) -> Any:
    """Parameters without their part in the subspaces of inputs. Pure and jittable.

    For factors of LoRA that meet the layer's input (``a`` of ``x a b``): drawn at random, ``a`` has
    a part in the subspace, through which every change of ``b`` would reach the reference inputs.
    Taken out once before training, while ``b`` is zero and the model stays as it is, and kept out
    by the projection, no reference input sees what the adapter learns.

    Args:
      opt_state: as for :func:`refresh`, after it.
      params: a pytree like the parameters.

    Returns:
      The parameters; leaves that are no kernels as they are.

    Raises:
      ValueError: no subspace of inputs in `opt_state`.
    """
    states = [state for state in find_states(opt_state) if isinstance(state, InputState)]
    if not states:
        raise ValueError("opt_state: no subspace of inputs here; ogpsa_project(subspace='inputs')?")
    for state in states:
        leaves, treedef = flatten_like(state.settings, params, "params")
        params = treedef.unflatten(project_inputs(leaves, state, freeze=False)[0])
    return params


def with_subspace(
    state: OgpsaState,
    accept: jax.Array,
    basis: Leaves,
    *,
    spectrum: jax.Array,
    mean: jax.Array,
    discarded: jax.Array,
) -> OgpsaState:
    """As :func:`with_basis`, from stacked orthonormal float32 leaves ``[k, ...]``."""
    own = state.directions()[0]
    basis = as_stored(basis, [old.dtype for old in own])
    squares = gram(basis, state.settings.groups)
    # Directions that orthonormalising dropped have no energy either.
    present = jnp.diagonal(squares, axis1=-2, axis2=-1) > 0
    lost = jnp.sum(jnp.where(present, 0.0, spectrum), axis=-1)
    return with_basis(
        state,
        accept,
        directions=[[leaf[j] for leaf in basis] for j in range(state.settings.rank)],
        gram=squares,
        spectrum=jnp.where(present, spectrum, 0.0),
        mean=jnp.where(present, mean, 0.0),
        discarded=discarded + lost,
    )


def with_basis(
    state: OgpsaState,
    accept: jax.Array,
    *,
    directions: Sequence[Sequence[jax.Array]],
    **arrays: jax.Array,
) -> OgpsaState:
    """`state` with another basis and what describes it, if `accept`; else one refusal more."""
    trees = tuple(
        jax.tree.structure(tree).unflatten(new)
        for tree, new in zip(state.basis, directions, strict=True)
    )
    arrays["metric"], arrays["rank_used"] = pseudo_inverse(arrays["gram"], state.settings.rank_tol)
    return state.after_refresh(accept, basis=trees, **arrays)
