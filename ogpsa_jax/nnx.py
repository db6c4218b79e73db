"""The core for users of Flax NNX. Needs flax; the core does not import this module.

``diagnostics`` needs no counterpart: it takes ``optimizer.opt_state`` as it is.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from ogpsa_jax.projection.momentum import Momentum
from ogpsa_jax.projection.reference import as_list
from ogpsa_jax.projection.refresh import refresh as _refresh
from ogpsa_jax.projection.streaming import push_reference as _push_reference


def refresh(
    optimizer: nnx.Optimizer, references: Sequence[Any], *, project_momentum: Momentum = False
) -> None:
    """As :func:`ogpsa_jax.refresh`, in place; also inside ``nnx.jit``.

    Args:
      optimizer: its ``opt_state`` is updated.
      references: gradients as ``nnx.grad`` returns them, or as
        :func:`ogpsa_jax.reference_gradients` does of ``nnx.state(model, nnx.Param)``.
      project_momentum: as for :func:`ogpsa_jax.refresh`.

    Raises:
      ValueError: as :func:`ogpsa_jax.refresh`.
    """
    given = as_list(references, "references", "reference gradient")
    pure = [nnx.as_pure(reference) for reference in given]
    state = nnx.as_pure(optimizer.opt_state)
    _store(optimizer, _refresh(state, pure, project_momentum=project_momentum))


def push_reference(
    optimizer: nnx.Optimizer,
    reference: Any,
    *,
    window: int | None = None,
    restart: bool | jax.Array = False,
    project_momentum: Momentum = False,
) -> None:
    """As :func:`ogpsa_jax.push_reference`, in place; also inside ``nnx.jit``.

    Args:
      optimizer: its ``opt_state`` is updated.
      reference: a gradient, as for :func:`refresh`.
      window: as for :func:`ogpsa_jax.push_reference`.
      restart: as for :func:`ogpsa_jax.push_reference`.
      project_momentum: as for :func:`ogpsa_jax.refresh`.

    Raises:
      ValueError: as :func:`ogpsa_jax.push_reference`.
    """
    new = _push_reference(
        nnx.as_pure(optimizer.opt_state),
        nnx.as_pure(reference),
        window=window,
        restart=restart,
        project_momentum=project_momentum,
    )
    _store(optimizer, new)


def _store(optimizer: nnx.Optimizer, opt_state: Any) -> None:
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
