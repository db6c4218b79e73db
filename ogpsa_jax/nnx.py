"""The core for users of Flax NNX. Needs flax; the core does not import this module.

``diagnostics`` needs no counterpart: it takes ``optimizer.opt_state`` as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from ogpsa_jax.projection.momentum import Momentum
from ogpsa_jax.projection.reference import as_list
from ogpsa_jax.projection.refresh import refresh as _refresh
from ogpsa_jax.projection.second_moments import Moments, SecondMoment, second_moment
from ogpsa_jax.projection.streaming import push_reference as _push_reference


def refresh(
    optimizer: nnx.Optimizer,
    references: Sequence[Any] | None = None,
    *,
    moments: Moments | None = None,
    project_momentum: Momentum = False,
) -> None:
    """As :func:`ogpsa_jax.refresh`, in place; also inside ``nnx.jit``.

    Args:
      optimizer: its ``opt_state`` is updated.
      references: gradients as ``nnx.grad`` returns them, or as
        :func:`ogpsa_jax.reference_gradients` does of ``nnx.state(model, nnx.Param)``.
      moments: as for :func:`ogpsa_jax.refresh`.
      project_momentum: as for :func:`ogpsa_jax.refresh`.

    Raises:
      ValueError: as :func:`ogpsa_jax.refresh`.
    """
    pure = None
    if references is not None:
        given = as_list(references, "references", "reference gradient")
        pure = [nnx.as_pure(reference) for reference in given]
    state = nnx.as_pure(optimizer.opt_state)
    new = _refresh(state, pure, moments=moments, project_momentum=project_momentum)
    _store(optimizer, new)


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


def collect_inputs(
    apply: Callable[[Any, Any], Any],
    model: nnx.Module,
    *,
    mask: Callable[[Any], jax.Array] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Callable[[Any, Any], Moments]:
    """A function for :func:`ogpsa_jax.input_moments`: what every ``nnx.Linear`` multiplies.

    Args:
      apply: ``(model, batch) -> anything``, which runs it.
      model: its structure, and variables that are not parameters.
      mask: ``batch -> bool [...]``, which positions count; as many as a layer has inputs.
      size: see :func:`ogpsa_jax.second_moment`.
      seed: see :func:`ogpsa_jax.second_moment`.

    Returns:
      ``collect(params, batch) -> moments``, by the names that :func:`ogpsa_jax.flax_kernels` gives
      the kernels of ``params = nnx.state(model, nnx.Param)``. Layers under ``nnx.scan`` or
      ``nnx.vmap`` are not seen from outside: let those return their moments themselves. While it is
      traced, calls of ``nnx.Linear`` in other threads are watched too.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from ogpsa_jax import input_moments
      >>> from ogpsa_jax.nnx import collect_inputs
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs))
      >>> collect = collect_inputs(lambda model, x: model(x), model)
      >>> moments = input_moments(collect, nnx.state(model, nnx.Param), jnp.ones((2, 5, 4)))
      >>> {name: moment.product.shape for name, moment in moments.items()}
      {'layers/0/kernel': (4, 4), 'layers/1/kernel': (3, 3)}
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def collect(params: Any, batch: Any) -> Moments:
        moments: dict[str, SecondMoment] = {}
        counted = None if mask is None else mask(batch)
        merged = nnx.merge(graphdef, params, rest)
        names = {id(module): path for path, module in nnx.iter_modules(merged)}
        call = nnx.Linear.__call__

        def watched(self: nnx.Linear, inputs: jax.Array, *args: Any, **kwargs: Any) -> Any:
            if id(self) in names:
                name = "/".join((*map(str, names[id(self)]), "kernel"))
                new = second_moment(inputs, counted, size=size, seed=seed)
                moments[name] = moments[name] + new if name in moments else new
            return call(self, inputs, *args, **kwargs)

        nnx.Linear.__call__ = watched
        try:
            apply(merged, batch)
        finally:
            nnx.Linear.__call__ = call
        return moments

    return collect


def _store(optimizer: nnx.Optimizer, opt_state: Any) -> None:
    nnx.update(optimizer.opt_state, nnx.state(opt_state))
