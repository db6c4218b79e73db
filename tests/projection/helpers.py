"""Small trees, and what NumPy says of them in float64."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogpsa_jax import ogpsa_project, refresh

from . import dense

fuses_on_cpu = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2),
    reason="before jax 0.10.2, XLA's CPU backend writes out the products that a sum adds up",
)


def random_tree(rng: np.random.Generator, scale: float = 1.0, dtype: Any = jnp.float32) -> Any:
    shapes = {"w": (7, 5), "layers": (3, 4, 6), "b": (9,)}
    return {
        name: jnp.asarray(scale * rng.standard_normal(shape), dtype)
        for name, shape in shapes.items()
    }


@partial(jax.jit, static_argnames=("rank", "settings"))
def _project(gradient: Any, references: Sequence[Any], rank: int, settings: Any) -> Any:
    tx = ogpsa_project(rank, **{k: dict(v) if isinstance(v, tuple) else v for k, v in settings})
    state = refresh(tx.init(gradient), references)
    return tx.update(gradient, state, gradient)


def project(gradient: Any, references: Sequence[Any], rank: int, **settings: Any) -> Any:
    """``(projected, state)`` of a fresh transformation, compiled once for each kind of input."""
    frozen = {k: tuple(v.items()) if isinstance(v, Mapping) else v for k, v in settings.items()}
    return _project(gradient, list(references), rank, tuple(sorted(frozen.items())))


def vectors(tree: Any, scope: str = "tensor", stacked: Any = None) -> list[np.ndarray]:
    """The tree as one float64 vector per group, in the order of the state's rows."""
    leaves = {name: np.asarray(leaf.astype(jnp.float32), np.float64) for name, leaf in tree.items()}
    if scope == "global":
        return [np.concatenate([leaf.ravel() for _, leaf in sorted(leaves.items())])]
    parts = []
    for name, leaf in sorted(leaves.items()):
        parts += [row.ravel() for row in leaf] if stacked and name == "layers" else [leaf.ravel()]
    return parts


def exact(gradient: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
    """`gradient` without its component in the span, in float64."""
    return dense.project(gradient, dense.gradient_basis(np.stack(references), len(references)))


def assert_close(actual: Any, desired: Any, rtol: float = 1e-6) -> None:
    """Equal within `rtol` of the largest entry of each leaf."""
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        x, y = (np.asarray(jnp.asarray(z).astype(jnp.float32), np.float64) for z in (x, y))
        np.testing.assert_allclose(x, y, atol=rtol * np.max(np.abs(y), initial=0.0), rtol=0)
