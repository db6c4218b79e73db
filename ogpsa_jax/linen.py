"""The core for users of Flax Linen. Needs flax; the core does not import this module.

``refresh``, ``diagnostics`` and all else need no counterpart: they take a ``TrainState`` as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen

from ogpsa_jax.projection.second_moments import Moments, SecondMoment, second_moment


def collect_inputs(
    apply: Callable[[Any, Any], Any],
    *,
    mask: Callable[[Any], jax.Array] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Callable[[Any, Any], Moments]:
    """A function for :func:`ogpsa_jax.input_moments`: what every ``linen.Dense`` multiplies.

    Args:
      apply: ``(params, batch) -> anything``, which runs the model.
      mask: ``batch -> bool [...]``, which positions count; as many as a layer has inputs.
      size: see :func:`ogpsa_jax.second_moment`.
      seed: see :func:`ogpsa_jax.second_moment`.

    Returns:
      ``collect(params, batch) -> moments``, by the names that :func:`ogpsa_jax.flax_kernels` gives
      the kernels where ``params`` is the collection of that name. Layers under ``linen.scan`` or
      ``linen.vmap`` are not seen from outside: let those return their moments themselves.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> from ogpsa_jax import input_moments
      >>> from ogpsa_jax.linen import collect_inputs
      >>> model = linen.Sequential([linen.Dense(3), linen.Dense(2)])
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> collect = collect_inputs(lambda params, x: model.apply({"params": params}, x))
      >>> moments = input_moments(collect, params, jnp.ones((2, 5, 4)))  # two batches of five rows
      >>> {name: moment.product.shape for name, moment in moments.items()}
      {'layers_0/kernel': (4, 4), 'layers_1/kernel': (3, 3)}
    """

    def collect(params: Any, batch: Any) -> Moments:
        moments: dict[str, SecondMoment] = {}
        counted = None if mask is None else mask(batch)

        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if isinstance(context.module, linen.Dense) and context.method_name == "__call__":
                inputs = args[0] if args else kwargs["inputs"]
                name = "/".join((*context.module.path, "kernel"))
                new = second_moment(inputs, counted, size=size, seed=seed)
                moments[name] = moments[name] + new if name in moments else new
            return call(*args, **kwargs)

        with linen.intercept_methods(interceptor):
            apply(params, batch)
        return moments

    return collect
