"""Every example of the core's documentation runs: docstrings, and the two pages."""

import doctest
import importlib
from pathlib import Path

import jax
import pytest

PAGES = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["transform", "refresh", "streaming", "reference", "diagnostics"])
def test_docstrings(name, strict):
    module = importlib.import_module(f"ogpsa_jax.projection.{name}")
    with jax.numpy_dtype_promotion("standard"):  # as users have it: Optax's Adam needs it
        failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


@pytest.mark.parametrize("page", ["core.md", "own-loop.md"])
def test_pages(page, strict):
    for package in ("mktestdocs", "flax"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from mktestdocs import check_md_file

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        check_md_file(PAGES / page, memory=True)
