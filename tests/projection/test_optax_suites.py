"""Optax's own suites for contributed optimizers and for sharding, with our chains in their tables.

Both ship in Optax's wheel. Their tables are made when their modules are imported, so the test
methods' undecorated bodies are called with our entries.
"""

import os
import re
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib
from optax.contrib import _common_test

from ogpsa_jax import ogpsa, ogpsa_project

with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of an optimizer in Optax's own table
    patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which the module overwrites
    from optax._src import sharding_test


def ogpsa_first(learning_rate):
    return optax.chain(ogpsa_project(2), optax.sgd(learning_rate))


def ogpsa_last(learning_rate):
    return optax.chain(optax.sgd(learning_rate), ogpsa_project(2, scope="global"))


def ogpsa_both(learning_rate):
    return ogpsa(optax.sgd(learning_rate), 2, placement="both")


CHAINS = {make.__name__: make for make in (ogpsa_first, ogpsa_last, ogpsa_both)}
NO_WRAPPER = {"wrapper_name": None, "wrapper_kwargs": None}


@pytest.fixture(autouse=True)
def as_optax_runs_them(monkeypatch, strict):
    """Our chains under their names in `contrib`, and JAX's default promotion, as Optax has it."""
    for name, make in CHAINS.items():
        monkeypatch.setattr(contrib, name, make, raising=False)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def call(case, name, **arguments):
    """The body of a parameterised test method of Optax, on arguments of ours."""
    generated = rf"{name}(\d+|_adam)"  # as absl names the first of its table
    body = next(m for key, m in vars(type(case)).items() if re.fullmatch(generated, key))
    while hasattr(body, "__wrapped__"):
        body = body.__wrapped__
    cells = [cell.cell_contents for cell in body.__closure__ or ()]
    body = next((cell for cell in cells if getattr(cell, "__name__", None) == name), body)
    body(case, **arguments)


@pytest.mark.parametrize("opt_name", CHAINS)
@pytest.mark.parametrize(
    ("test", "arguments"),
    [
        ("test_optimizers_accept_extra_args", {**NO_WRAPPER, "wrap": False}),
        (
            "test_optimizers",
            {**NO_WRAPPER, "target": "_setup_mixed_tensor_target", "dtype": "float32"},
        ),
        ("test_optimizers_can_be_wrapped_in_inject_hyperparams", {}),
        ("test_preserve_dtype", {"dtype": "bfloat16"}),
        ("test_gradient_accumulation", {"dtype": "bfloat16"}),
        ("test_state_shape_dtype_shard_stability", {**NO_WRAPPER, "dtype": jnp.float16}),
        ("test_state_shape_dtype_shard_stability", {**NO_WRAPPER, "dtype": jnp.float64}),
    ],
    ids=lambda value: value[5:] if isinstance(value, str) else str(value.get("dtype", "")),
)
def test_contributed_optimizers(opt_name, test, arguments):
    case = _common_test.ContribTest()
    arguments = dict(arguments)
    if "target" in arguments:
        arguments["target"] = getattr(_common_test, arguments["target"])
    call(case, test, opt_name=opt_name, opt_kwargs={"learning_rate": 1e-2}, **arguments)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(
    "test",
    [
        "test_init_with_abstract_input",
        "test_state_sharding_type_init_match_update",
        "test_state_sharding_type_preserved_with_jit",
    ],
)
def test_sharding(name, test, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "1")  # compared as a string, 0.10 would be too old
    call(sharding_test.ShardingTest(), test, optimizer=CHAINS[name](1.0))
