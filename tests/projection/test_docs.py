"""Every example in the core's docstrings runs; those of the pages are in tests/documents."""

import doctest
import importlib

import jax
import pytest

NAMES = "transform refresh streaming reference diagnostics second_moments column_adam"
MODULES = [f"projection.{name}" for name in NAMES.split()] + ["linen", "nnx"]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name, strict):
    if not name.startswith("projection."):
        pytest.importorskip("flax", reason="flax is not installed")
    module = importlib.import_module(f"ogpsa_jax.{name}")
    with jax.numpy_dtype_promotion("standard"):  # as users have it: Optax's Adam needs it
        failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
