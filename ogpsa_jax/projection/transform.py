"""The Optax shell: a transformation that holds the basis in its state and projects.

Where it stands in a chain decides what it projects: before the optimizer the gradient (the paper),
after it the update, weight decay included.
"""

from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax.projection.groups import MASKED, Scope, Stacked, form_groups
from ogpsa_jax.projection.project import RULES, project
from ogpsa_jax.projection.state import Alignment, NoLeaves, OgpsaState, Settings

Placement = Literal["gradient", "update", "both"]


def ogpsa_project(
    rank: int,
    *,
    scope: Scope = "tensor",
    rule: str = "orthogonal",
    scale: float = 1.0,
    basis_dtype: Any = None,
    rank_tol: float = 1e-6,
    stacked: Stacked = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Remove from gradients, or updates, their component in the reference subspace.

    .. math::
        g \leftarrow g - Q M Q^\top g, \qquad M = (Q^\top Q)^{-1}

    with the columns of :math:`Q` an orthonormal basis of the span of the reference gradients, per
    group of leaves. The identity until the first :func:`ogpsa_jax.refresh`.

    Args:
      rank: directions kept per group, 1 to 64.
      scope: ``"tensor"``: every weight tensor is a group (the official code); ``"global"``: the
        whole tree is one (the paper's equations); ``(path, leaf) -> label``: leaves with the same
        label are one group, a label of None freezes the leaf.
      rule: ``"orthogonal"`` removes the component in the span; ``"conflict"`` removes it only where
        it points against the sum of the unit references, and multiplies the gradient by `scale`
        where it agrees (the official ``threshold``); ``"inplane"`` keeps nothing else (an
        ablation); ``"none"`` measures and leaves alone.
      scale: see `rule`.
      basis_dtype: of the stored basis, as a dtype or its name; None: the parameters'.
      rank_tol: directions whose eigenvalue is below this share of the largest are dropped.
      stacked: which leaves stack layers, along which axis: regex → axis, or
        ``(path, leaf) -> axis or None``. In tensor scope each layer is then a group of its own.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`OgpsaState`.

    Raises:
      ValueError: an argument is out of its range; from ``init``: a parameter that is no array or
        complex, none that could be projected, or a stacking axis that a leaf does not have.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from ogpsa_jax import ogpsa_project, refresh
      >>> params = {"w": jnp.zeros(3)}
      >>> tx = optax.chain(ogpsa_project(rank=1), optax.sgd(1.0))
      >>> state = refresh(tx.init(params), [{"w": jnp.array([0.0, 2.0, 0.0])}])
      >>> updates, state = tx.update({"w": jnp.array([1.0, 1.0, 1.0])}, state, params)
      >>> [float(x) + 0.0 for x in updates["w"]]
      [-1.0, 0.0, -1.0]

    References:
      Sun et al., `Safety Alignment as Continual Learning: Mitigating the Alignment Tax via
      Orthogonal Gradient Projection <https://arxiv.org/abs/2602.07892>`_, 2026.
    """
    if isinstance(rank, bool) or not isinstance(rank, Integral) or not 1 <= rank <= 64:
        raise ValueError(f"rank must be an integer between 1 and 64, got {rank!r}")
    if not (callable(scope) or scope in ("tensor", "global")):
        raise ValueError(f"scope must be 'tensor', 'global' or a callable, got {scope!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not rank_tol > 0:
        raise ValueError(f"rank_tol must be positive, got {rank_tol}")
    if not (stacked is None or callable(stacked) or isinstance(stacked, Mapping)):
        raise ValueError(f"stacked must be a callable or a regex → axis mapping, got {stacked!r}")
    dtype = None if basis_dtype is None else jnp.dtype(basis_dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"basis_dtype must be a floating-point type, got {basis_dtype!r}")

    def init_fn(params: optax.Params) -> OgpsaState:
        paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        held, groups = form_groups(paths_and_leaves, scope, stacked)
        if paths_and_leaves and not groups:
            raise ValueError("params: no floating-point leaf that the scope does not freeze")

        def zeros() -> Any:
            # From the parameters, so that sharding and memory kind carry over; anew each time,
            # because aliased buffers cannot be donated.
            return treedef.unflatten(
                [
                    jnp.zeros_like(leaf, dtype=dtype) if holds else MASKED
                    for (_, leaf), holds in zip(paths_and_leaves, held, strict=True)
                ]
            )

        def per_group(*trailing: int, dtype: Any = jnp.float32) -> jax.Array:
            return jnp.zeros((groups[-1].rows.stop if groups else 0, *trailing), dtype)

        kind = Settings if groups else NoLeaves  # the latter: all leaves masked, a placeholder
        return OgpsaState(
            basis=tuple(zeros() for _ in range(rank)),
            gram=per_group(rank, rank),
            metric=per_group(rank, rank),
            spectrum=per_group(rank),
            mean=per_group(rank),
            discarded=per_group(),
            rank_used=per_group(dtype=jnp.int32),
            squared_norm=per_group(),
            in_span=per_group(),
            removed=per_group(),
            steps_since_refresh=jnp.zeros([], jnp.int32),
            refreshes=jnp.zeros([], jnp.int32),
            refused_refreshes=jnp.zeros([], jnp.int32),
            projected_moments=jnp.zeros([], jnp.int32),
            settings=kind(int(rank), rule, float(rank_tol), tuple(held), groups),
        )

    def update_fn(
        updates: optax.Updates,
        state: OgpsaState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OgpsaState]:
        del params, extra_args
        return apply_projection(updates, state, scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def apply_projection(
    updates: optax.Updates, state: OgpsaState, scale: Any, *, sign: float = 1.0
) -> tuple[optax.Updates, OgpsaState]:
    """Apply the state's rule to `updates`; `sign` is −1 where they point down the gradient."""
    settings = state.settings
    if not settings.groups:
        return updates, state
    aligned = Alignment(state, updates, "updates")
    leaves, energies = project(
        aligned.leaves, state.subspaces(), settings.groups, settings.rule, scale, sign
    )
    new_state = replace(
        state,
        squared_norm=energies.before,
        in_span=energies.in_span,
        removed=energies.before - energies.after,
        steps_since_refresh=optax.safe_increment(state.steps_since_refresh),
    )
    return aligned.rebuild(leaves), new_state


class OgpsaWrapperState(NamedTuple):
    """State of :func:`ogpsa`: one basis, and the wrapped optimizer's state."""

    projection: OgpsaState
    inner: optax.OptState


def ogpsa(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    placement: Placement = "gradient",
    scale: float = 1.0,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer: project what enters it, what leaves it, or both, with one basis.

    Args:
      inner: any optimizer.
      rank: see :func:`ogpsa_project`.
      placement: ``"gradient"``: as ``chain(ogpsa_project(...), inner)``, the paper; ``"update"``:
        as ``chain(inner, ogpsa_project(...))``, which keeps every reference loss to first
        order (and here the conflict rule knows that updates point down the gradient); ``"both"``.
      scale: see :func:`ogpsa_project`.
      **settings: the others of :func:`ogpsa_project`.

    Returns:
      The wrapped optimizer. With ``"both"`` the diagnostics speak of the update.

    Raises:
      ValueError: `placement` is none of the three, or a setting is out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from ogpsa_jax import ogpsa, refresh
      >>> params = jnp.array([1.0, 1.0])
      >>> tx = ogpsa(optax.adamw(0.1, weight_decay=0.5), rank=1, placement="update")
      >>> state = refresh(tx.init(params), [jnp.array([0.0, 1.0])])
      >>> updates, state = tx.update(jnp.array([1.0, 1.0]), state, params)
      >>> float(updates[1])  # weight decay included
      0.0
    """
    if placement not in ("gradient", "update", "both"):
        raise ValueError(f"placement must be 'gradient', 'update' or 'both', got {placement!r}")
    projection = ogpsa_project(rank, scale=scale, **settings)
    optimizer = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> OgpsaWrapperState:
        return OgpsaWrapperState(projection.init(params), optimizer.init(params))

    def update_fn(
        updates: optax.Updates,
        state: OgpsaWrapperState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OgpsaWrapperState]:
        measured = state.projection
        if placement != "update":
            updates, measured = apply_projection(updates, state.projection, scale)
        updates, inner_state = optimizer.update(updates, state.inner, params, **extra_args)
        if placement != "gradient":
            updates, measured = apply_projection(updates, state.projection, scale, sign=-1.0)
        return updates, OgpsaWrapperState(measured, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
