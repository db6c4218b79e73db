"""Matrix products on meshes with explicit axes, which ask where the result of each is to lie."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

_WHOLE = PartitionSpec()  # type: ignore[no-untyped-call]


def let_compiler_place(fn: Callable[..., Any], like: Any, *args: Any) -> Any:
    """``fn(*args)``, where the compiler decides how to sum over sharded axes.

    Args:
      fn: a function of arrays.
      like: a tree shaped like its result: arrays, which the result's arrays are to lie like, or
        None for those that are to be whole on every device.
      *args: pytrees of arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return fn(*args)

    def spec(leaf: Any) -> PartitionSpec:
        return _WHOLE if leaf is None else jax.typeof(leaf).sharding.spec

    out = jax.tree.map(spec, like, is_leaf=lambda leaf: leaf is None)
    return jax.sharding.auto_axes(fn, out_sharding=out)(*args)
