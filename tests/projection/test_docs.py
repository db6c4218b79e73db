"""The core's documents: docstrings run, and the method shown is what the tests compare with.

The examples of the pages run in tests/documents.
"""

import doctest
import importlib
from pathlib import Path

import jax
import pytest

from . import dense

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


def test_the_dense_method_is_the_one_that_is_documented():
    page = Path(__file__).parents[2] / "docs" / "core.md"
    if not page.exists():
        pytest.skip("the core's tests were copied without the documents")
    shown = Path(dense.__file__).read_text(encoding="utf-8")
    assert f"```python\n{shown}```" in page.read_text(encoding="utf-8")
