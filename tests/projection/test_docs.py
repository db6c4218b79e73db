"""Every example in the core's docstrings runs; those of the pages are in tests/documents."""

import doctest
import importlib

import jax
import pytest


@pytest.mark.parametrize("name", ["transform", "refresh", "streaming", "reference", "diagnostics"])
def test_docstrings(name, strict):
    module = importlib.import_module(f"ogpsa_jax.projection.{name}")
    with jax.numpy_dtype_promotion("standard"):  # as users have it: Optax's Adam needs it
        failed, tried = doctest.testmod(module)
    assert tried
    assert not failed
