"""Replacing the basis: pure functions of the optimizer state, whatever wraps ours.

References passed through ``update`` instead would silently be dropped by ``MultiSteps`` and refused
by ``partition``; a basis made inside ``update`` would cost its temporaries at every step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ogpsa_jax.projection.find import find_states, replace_states
from ogpsa_jax.projection.input_state import InputState, flatten_like
from ogpsa_jax.projection.input_subspace import project_inputs, refresh_inputs
from ogpsa_jax.projection.momentum import Momentum, project_first_moments
from ogpsa_jax.projection.reference import as_list
from ogpsa_jax.projection.second_moments import Moments
from ogpsa_jax.projection.state import Alignment, OgpsaState
from ogpsa_jax.projection.subspace import span_of


def refresh(
    opt_state: Any,
    references: Sequence[Any] | None = None,
    *,
    moments: Moments | None = None,
    project_momentum: Momentum = False,
) -> Any:
    """Compute the basis from reference gradients, or moments. Pure and jittable.

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
        `diagnostics` says how many leaves it found. A mapping, regex → bool, says of paths in
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
    change = partial(_refreshed_state, references=references, moments=moments)
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


def _refreshed_state(
    state: OgpsaState | InputState, references: Sequence[Any] | None, moments: Moments | None
) -> OgpsaState | InputState:
    if isinstance(state, InputState):
        if moments is not None:
            state = refresh_inputs(state, moments)
        if references is not None and state.others is not None:
            state = replace(state, others=_refreshed_span(state.others, references))
        return state
    return state if references is None else _refreshed_span(state, references)


def _refreshed_span(state: OgpsaState, references: Sequence[Any]) -> OgpsaState:
    settings = state.settings
    references_MxN = zip(
        *(Alignment(state, tree, "references").leaves for tree in references), strict=True
    )
    span = span_of(list(references_MxN), settings.groups, settings.rank, settings.rank_tol)
    return state.with_span(span)


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
      The parameters; leaves that are not kernels do not change.

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
