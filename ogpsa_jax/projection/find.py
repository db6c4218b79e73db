"""Finding our states inside any Optax state: by type, never by field name."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ogpsa_jax.projection.state import ProjectionState


def is_ours(node: Any) -> bool:
    """Whether `node` is the state of a projection."""
    return isinstance(node, ProjectionState)


def projects(opt_state: Any) -> bool:
    """Whether there is any state of ours in `opt_state`."""
    return any(map(is_ours, jax.tree.leaves(opt_state, is_leaf=is_ours)))


def find_states(opt_state: Any) -> list[Any]:
    """All states of :func:`ogpsa_jax.ogpsa_project` in `opt_state`, in tree order.

    Raises:
      ValueError: there is none; the message names what was looked through.
    """
    found = [leaf for leaf in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(leaf)]
    if not found:
        raise ValueError(
            "opt_state: found no OgpsaState, having looked through "
            f"{_outline(opt_state)}; is ogpsa_project(...) in the chain?"
        )
    return found


def with_others(states: Sequence[Any]) -> list[Any]:
    """States of ours, each followed by the gradient subspace of its other leaves, if it has one."""
    found: list[Any] = []
    for state in states:
        others = getattr(state, "others", None)
        found += [state] if others is None else [state, others]
    return found


def replace_states(opt_state: Any, change: Callable[[Any], Any]) -> Any:
    """`opt_state` with every state of ours changed that contains any leaves.

    Raises:
      ValueError: as :func:`find_states`.
    """
    find_states(opt_state)

    def visit(node: Any) -> Any:
        return change(node) if is_ours(node) and node.settings.groups else node

    return jax.tree.map(visit, opt_state, is_leaf=is_ours)


def _outline(node: Any) -> str:
    """The types of the nodes of a state, for an error message."""
    if type(node) is tuple:
        return "(" + ", ".join(_outline(item) for item in node) + ")"
    name = type(node).__name__
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        inside = [
            f"{field}={_outline(value)}"
            for field, value in node._asdict().items()
            if isinstance(value, tuple)
        ]
        return name + (f"[{', '.join(inside)}]" if inside else "")
    return name
