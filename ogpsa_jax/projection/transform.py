"""The Optax shell: a transformation that keeps the basis in its state and projects.

Where it stands in a chain decides what it projects: before the optimizer the gradient (the paper),
after it the update, weight decay included.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax.projection.groups import Scope, Stacked, is_masked
from ogpsa_jax.projection.input_state import InputState, Others, init_inputs, init_others
from ogpsa_jax.projection.input_subspace import apply_inputs
from ogpsa_jax.projection.kernels import Kernels
from ogpsa_jax.projection.state import Alignment, OgpsaState, init_span
from ogpsa_jax.projection.streaming import push_reference
from ogpsa_jax.projection.subspace import RULES, project

Placement = Literal["gradient", "update", "both"]
Subspace = Literal["gradients", "inputs"]


def ogpsa_project(
    rank: int,
    *,
    scope: Scope = "tensor",
    rule: str = "orthogonal",
    scale: float = 1.0,
    basis_dtype: Any = None,
    rank_tol: float = 1e-6,
    stacked: Stacked = None,
    subspace: Subspace = "gradients",
    energy: float | None = None,
    kernels: Kernels | None = None,
    others: Others | None = None,
    others_rank: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Remove from gradients, or updates, their component in the reference subspace.

    .. math::
        g \leftarrow g - Q M Q^\top g, \qquad M = (Q^\top Q)^{-1}

    with the columns of :math:`Q` an orthonormal basis of the span of the reference gradients, per
    group of leaves. With ``subspace="inputs"``, for every matrix ``[in, out]``,

    .. math::
        g \leftarrow g - U (U^\top U)^{-1} U^\top g

    with the columns of :math:`U` ``[in, r]`` those directions of the layer's reference inputs that
    span the share `energy` of their second moment. The identity until the first
    :func:`ogpsa_jax.refresh` (but for leaves that `others` freezes). An optimizer that scales
    elementwise, as Adam does, turns what is left back into the subspace: use
    ``ogpsa(..., placement="both")``, or :func:`ogpsa_jax.column_adamw`, whose scaling commutes.

    Args:
      rank: directions kept per group, 1 to 64; with inputs, columns of U at most.
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
      subspace: ``"gradients"``: spanned by whole reference gradients, ``rank`` times the memory of
        the parameters; ``"inputs"``: by the inputs of layers, for which :func:`ogpsa_jax.refresh`
        takes `moments`.
      energy: with inputs, the share of the second moment that U covers, in [1e-6, 1]; None: 0.95.
      kernels: with inputs, which leaves are matrices: regex → :class:`ogpsa_jax.Kernel`, or
        ``(path, leaf) -> Kernel or None``, such as :func:`ogpsa_jax.flax_kernels`.
      others: with inputs, what happens to the leaves that are not kernels (embeddings, norms,
        biases): ``"freeze"`` zeroes them (the default), ``"leave"`` lets them through,
        ``"gradients"`` projects them off a gradient span of rank `others_rank` (with `scope`,
        `stacked` as above; ``refresh`` then takes references too).
      others_rank: see `others`; None: 2. (A number here would become a hyperparameter inside
        ``optax.inject_hyperparams``; so would `rank`, `rank_tol` and `energy`, and `kernels` a
        schedule: name all four in ``static_args``.)

    Returns:
      An ``optax.GradientTransformationExtraArgs`` whose state is an :class:`OgpsaState` or, with
      inputs, an :class:`InputState`.

    Raises:
      ValueError: an argument is out of its range; from ``init``: a parameter that is no array or
        complex, none that could be projected, or axes that a leaf does not have.

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
    _check_subspace(subspace, rule, energy, kernels, others)
    _check_settings(rank, scope, rule, rank_tol, stacked, others_rank, subspace == "inputs")
    dtype = None if basis_dtype is None else jnp.dtype(basis_dtype)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"basis_dtype must be a floating-point type, got {basis_dtype!r}")
    of_span: dict[str, Any] = {
        "rule": rule,
        "rank_tol": float(rank_tol),
        "stacked": stacked,
        "dtype": dtype,
    }

    def init_fn(params: optax.Params) -> OgpsaState | InputState:
        if kernels is None:
            return init_span(params, int(rank), scope, **of_span)
        span = None
        if others == "gradients":
            span = init_others(params, int(others_rank or 2), scope, kernels, **of_span)
        return init_inputs(
            params,
            rank=int(rank),
            energy=0.95 if energy is None else float(energy),
            rule=rule,
            rank_tol=float(rank_tol),
            kernels=kernels,
            freeze=others in (None, "freeze") and rule != "none",
            others=span,
            dtype=dtype,
        )

    def update_fn(
        updates: optax.Updates,
        state: OgpsaState | InputState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OgpsaState | InputState]:
        del params, extra_args
        return apply_projection(updates, state, scale)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_subspace(
    subspace: str, rule: str, energy: float | None, kernels: Any, others: str | None
) -> None:
    if subspace not in ("gradients", "inputs"):
        raise ValueError(f"subspace must be 'gradients' or 'inputs', got {subspace!r}")
    if others not in (None, "freeze", "gradients", "leave"):
        raise ValueError(f"others must be 'freeze', 'gradients' or 'leave', got {others!r}")
    if energy is not None and not 1e-6 <= energy <= 1:
        raise ValueError(f"energy must lie in [1e-6, 1], got {energy}")
    if subspace == "gradients":
        if energy is not None or kernels is not None or others is not None:
            raise ValueError("energy, kernels and others need subspace='inputs'")
        return
    if kernels is None:
        raise ValueError(
            "kernels: subspace='inputs' needs to know which leaves are matrices, and which of "
            "their axes meets the input; flax_kernels does for Flax's dense layers"
        )
    if rule == "conflict":
        raise ValueError("rule: 'conflict' needs subspace='gradients', which have a direction")


def _check_settings(
    rank: Any,
    scope: Any,
    rule: str,
    rank_tol: float,
    stacked: Any,
    others_rank: Any,
    inputs: bool,
) -> None:
    ranks: dict[str, int] = {"rank": rank, "others_rank": 2 if others_rank is None else others_rank}
    for name, value in ranks.items():
        most = math.inf if inputs and name == "rank" else 64
        if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= most:
            between = "of at least 1" if most > 64 else "between 1 and 64"
            raise ValueError(f"{name} must be an integer {between}, got {value!r}")
    if not (callable(scope) or scope in ("tensor", "global")):
        raise ValueError(f"scope must be 'tensor', 'global' or a callable, got {scope!r}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not rank_tol > 0:
        raise ValueError(f"rank_tol must be positive, got {rank_tol}")
    if not (stacked is None or callable(stacked) or isinstance(stacked, Mapping)):
        raise ValueError(f"stacked must be a callable or a regex → axis mapping, got {stacked!r}")


@jax.named_scope("ogpsa_projection")  # its name in profiles and compiled programs
def apply_projection(
    updates: optax.Updates, state: OgpsaState | InputState, scale: Any, *, sign: float = 1.0
) -> tuple[optax.Updates, OgpsaState | InputState]:
    """Apply the state's rule to `updates`; `sign` is −1 where they point down the gradient."""
    if isinstance(state, InputState):
        updates, state = apply_inputs(updates, state)
        if state.others is not None:
            updates, others = _apply_span(updates, state.others, scale, sign)
            state = replace(state, others=others)
        return updates, state
    return _apply_span(updates, state, scale, sign)


def _apply_span(
    updates: optax.Updates, state: OgpsaState, scale: Any, sign: float
) -> tuple[optax.Updates, OgpsaState]:
    settings = state.settings
    if not settings.groups:
        return updates, state
    aligned = Alignment(state, updates, "updates")
    leaves, energies = project(
        aligned.leaves, state.subspaces(), settings.groups, settings.rule, scale, sign
    )
    removed = energies.before - energies.after
    new_state = state.after_update(energies.before, energies.in_span, removed)
    return aligned.rebuild(leaves), new_state


class OgpsaWrapperState(NamedTuple):
    """State of :func:`ogpsa`: one basis, and the wrapped optimizer's state."""

    projection: OgpsaState | InputState
    inner: optax.OptState


def ogpsa(
    inner: optax.GradientTransformation,
    rank: int,
    *,
    placement: Placement | None = None,
    scale: float = 1.0,
    replay: float | None = None,
    window: int | None = None,
    project_momentum: bool = False,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer: project what enters it, what leaves it, or both, with one basis.

    With `replay` or `window`, ``update`` takes the gradient of the step's own reference rows as the
    keyword ``reference``, and refuses to go without: every step then takes a reference batch, and
    with `replay` trains on it as well.

    Args:
      inner: any optimizer.
      rank: see :func:`ogpsa_project`.
      placement: ``"gradient"``: as ``chain(ogpsa_project(...), inner)``, the paper; ``"update"``:
        as ``chain(inner, ogpsa_project(...))``, which keeps every reference loss to first
        order (and here the conflict rule knows that updates point down the gradient); ``"both"``.
        None: ``"both"`` with inputs, ``"gradient"`` with gradients.
      scale: see :func:`ogpsa_project`.
      replay: weight with which the reference gradient is added to the training gradient. With a
        span of gradients, after the projection, which would take it out again. With inputs,
        before it: what is trained on from references then stays outside the subspace too.
      window: with a span of gradients, how many reference gradients the basis remembers; each
        update folds ``reference`` in first (:func:`ogpsa_jax.push_reference`).
      project_momentum: with `window`, also project the first moments with each new basis.
      **settings: the others of :func:`ogpsa_project`.

    Returns:
      The wrapped optimizer. With ``"both"`` the diagnostics speak of the gradient where the
      subspace is one of inputs, else of the update.

    Raises:
      ValueError: `placement` is none of the three, a setting is out of its range, or settings
        contradict each other; from ``update``: ``reference`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from ogpsa_jax import ogpsa, refresh
      >>> params = jnp.array([1.0, 1.0])
      >>> tx = ogpsa(optax.adamw(0.1, weight_decay=0.5), rank=1, placement="update")
      >>> state = refresh(tx.init(params), [jnp.array([0.0, 1.0])])
      >>> updates, state = tx.update(jnp.array([1.0, 1.0]), state, params)
      >>> float(updates[1])  # weight decay included
      0.0
      >>> tx = ogpsa(optax.sgd(1.0), rank=1, window=1, replay=0.5)
      >>> reference = jnp.array([0.0, 2.0])
      >>> state, gradient = tx.init(params), jnp.array([1.0, 1.0])
      >>> updates, _ = tx.update(gradient, state, params, reference=reference)
      >>> updates.tolist()  # the projected gradient, and half of the reference's
      [-1.0, -1.0]
    """
    inputs = settings.get("subspace") == "inputs"
    placement = placement or ("both" if inputs else "gradient")
    _check_wrapper(placement, replay, window, inputs)
    projection = ogpsa_project(rank, scale=scale, **settings)
    optimizer = optax.with_extra_args_support(inner)
    takes_reference = replay is not None or window is not None

    def init_fn(params: optax.Params) -> OgpsaWrapperState:
        return OgpsaWrapperState(projection.init(params), optimizer.init(params))

    def update_fn(
        updates: optax.Updates,
        state: OgpsaWrapperState,
        params: optax.Params | None = None,
        *,
        reference: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OgpsaWrapperState]:
        if takes_reference and reference is None:
            raise ValueError(
                "update: the keyword reference, the gradient of the step's reference rows, is "
                "missing; wrappers that drop it (MultiSteps, partition, a TrainState) must be "
                "inside ogpsa(...), not around it"
            )
        if window is not None:
            state = push_reference(
                state, reference, window=window, project_momentum=project_momentum
            )
        if replay and inputs:
            updates = _plus(updates, replay, reference)
        measured = state.projection
        if placement != "update":
            updates, measured = apply_projection(updates, state.projection, scale)
        if replay and not inputs:
            updates = _plus(updates, replay, reference)
        updates, inner_state = optimizer.update(updates, state.inner, params, **extra_args)
        if placement != "gradient":
            updates, last = apply_projection(updates, state.projection, scale, sign=-1.0)
            measured = measured if inputs and placement == "both" else last
        return updates, OgpsaWrapperState(measured, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _plus(updates: Any, weight: float, reference: Any) -> Any:
    """``updates + weight · reference``, where the updates are not masked."""

    def plus(update: Any, ref: Any) -> Any:
        if is_masked(update):
            return update
        return update + (ref.astype(jnp.float32) * weight).astype(update.dtype)

    return jax.tree.map(plus, updates, reference, is_leaf=is_masked)


def _check_wrapper(placement: str, replay: float | None, window: int | None, inputs: bool) -> None:
    if placement not in ("gradient", "update", "both"):
        raise ValueError(f"placement must be 'gradient', 'update' or 'both', got {placement!r}")
    if replay is not None and not (math.isfinite(replay) and replay >= 0):
        raise ValueError(f"replay must be a finite number of at least 0, got {replay}")
    if replay and not inputs and placement != "gradient":
        raise ValueError(
            f"replay: with a span of gradients, placement={placement!r} takes the replayed "
            "gradient out of the update again; use placement='gradient'"
        )
    if window is not None and inputs:
        raise ValueError("window: a subspace of inputs is made by refresh, not by references")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
