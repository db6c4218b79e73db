"""The core for Flax NNX users. Imports flax; nothing of the core imports this module."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from ogpsa_jax.projection import refresh as functional


def refresh(
    optimizer: nnx.Optimizer, references: Sequence[Any], *, project_momentum: bool = False
) -> None:
    """As :func:`ogpsa_jax.refresh`, in place on an ``nnx.Optimizer``.

    Args:
      optimizer: the optimizer; its ``opt_state`` is updated.
      references: gradients as ``nnx.grad`` returns them, or pytrees of arrays like them.
      project_momentum: as for :func:`ogpsa_jax.refresh`.

    Raises:
      ValueError: as :func:`ogpsa_jax.refresh`.
    """
    state = nnx.pure(optimizer.opt_state)
    references = [nnx.pure(reference) for reference in references]
    new = functional.refresh(state, references, project_momentum=project_momentum)
    nnx.update(optimizer.opt_state, nnx.state(new))
