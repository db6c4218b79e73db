"""The core's tests run under the strictest settings JAX has, and print the seed they drew."""

import secrets
from collections.abc import Callable, Iterator

import jax
import numpy as np
import optax
import pytest


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """No implicit dtype or rank promotion anywhere in the core."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator freshly seeded in each test; pytest shows the seed when the test fails."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def _relaxed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra_args):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@pytest.fixture(scope="session")
def relaxed() -> Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs]:
    """Wraps one of Optax's own optimizers, which promote dtypes implicitly: them, and only them."""
    return _relaxed
