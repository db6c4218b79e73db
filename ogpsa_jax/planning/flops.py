"""Floating-point operations of a program, its loops counted as often as they run."""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """Multiplications and additions in the matrix products of ``fn(*args)``, over all devices.

    They are counted in the program as traced: what automatic differentiation and rematerialisation
    add is in it, what the compiler removes is as well. A loop without a fixed number of rounds
    counts as one round.

    Args:
      fn: a function of arrays.
      *args: arrays, or their shapes.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
        return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    inside = sum(_count(getattr(x, "jaxpr", x)) for x in _jaxprs(params))
    if name == "scan":
        return inside * int(params["length"])
    if name == "shard_map":
        return inside * int(params["mesh"].size)
    if name == "pallas_call":
        # A causal kernel skips the blocks above the diagonal, which are half of them.
        return inside * math.prod(params["grid_mapping"].grid) // 2
    return inside


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    values = [x for value in params.values() for x in (value if _is_list(value) else [value])]
    return [x for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple | list)
