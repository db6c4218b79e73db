"""Inside Flax: NNX optimizers and Linen train states, with and without sharding metadata."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import ogpsa_jax
from ogpsa_jax import (
    diagnostics,
    first_order_change,
    input_moments,
    ogpsa_project,
    reference_gradients,
    refresh,
)

flax = pytest.importorskip("flax", reason="flax is not installed")
from flax import linen, nnx  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402

import ogpsa_jax.linen  # noqa: E402
import ogpsa_jax.nnx  # noqa: E402


@pytest.fixture(autouse=True)
def as_flax_runs(strict):
    """Flax's layers promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def loss(model, batch):
    return jnp.mean((model(batch) - 1.0) ** 2)


@pytest.mark.parametrize("sharded", [False, True])
def test_nnx_optimizer(rng, sharded):
    if jax.device_count() != 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        init = nnx.initializers.lecun_normal()
        if sharded:
            init = nnx.with_partitioning(init, (None, "fsdp"))
        model = nnx.Linear(4, 8, kernel_init=init, rngs=nnx.Rngs(int(rng.integers(2**31))))
        tx = optax.chain(optax.adam(1e-2), ogpsa_project(1, scope="global"))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        inputs = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)

        @nnx.jit
        def step(model, optimizer, reference, batch):
            reference = nnx.grad(loss)(model, reference)
            ogpsa_jax.nnx.refresh(optimizer, [reference])
            gradient = nnx.grad(loss)(model, batch)
            before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))
            optimizer.update(model, gradient)
            return before, nnx.as_pure(reference)

        before, reference = step(model, optimizer, inputs[0], inputs[1])
        after = nnx.as_pure(nnx.state(model, nnx.Param))
        moved = jax.tree.map(jnp.subtract, after, before)
        assert abs(float(first_order_change([reference], moved)[0])) < 1e-4
        assert int(diagnostics(optimizer.opt_state)["refreshes"]) == 1
        kernel = optimizer.opt_state[1].basis[0]["kernel"]
        if sharded:
            assert kernel.get_value().sharding.spec == PartitionSpec(None, "fsdp")
        ogpsa_jax.nnx.push_reference(optimizer, before, window=1, project_momentum=True)
        moment = nnx.as_pure(optimizer.opt_state)[0][0].mu
        assert abs(float(first_order_change([before], moment)[0])) < 1e-5


def seen(kernel, rows):
    """The share of a change of a kernel that some inputs see."""
    change, x = np.asarray(kernel, np.float64), np.asarray(rows, np.float64)
    return np.linalg.norm(x @ change) / (np.linalg.norm(x) * np.linalg.norm(change))


def test_nnx_optimizer_with_a_subspace_of_inputs(rng):
    rngs = nnx.Rngs(int(rng.integers(2**31)))
    model = nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs))
    settings = {"subspace": "inputs", "energy": 1.0, "kernels": ogpsa_jax.flax_kernels}
    tx = ogpsa_jax.ogpsa(optax.adam(1e-2), 8, placement="both", **settings)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batches = jnp.asarray(rng.standard_normal((2, 2, 8)), jnp.float32)
    collect = ogpsa_jax.nnx.collect_inputs(lambda model, x: model(x), model)
    moments = input_moments(collect, nnx.state(model, nnx.Param), batches[:, :1])
    ogpsa_jax.nnx.refresh(optimizer, moments=moments)
    before = np.asarray(model.layers[0].kernel[...])

    @nnx.jit
    def step(model, optimizer, batch):
        optimizer.update(model, nnx.grad(loss)(model, batch))

    step(model, optimizer, jnp.asarray(rng.standard_normal((4, 8)), jnp.float32))
    change = np.asarray(model.layers[0].kernel[...]) - before
    assert seen(change, batches[:, 0]) < 1e-5  # of float32 steps added to weights of order one
    assert 0 < float(diagnostics(optimizer.opt_state)["removed_fraction"]) < 1


def test_linen_train_state_with_a_subspace_of_inputs(rng):
    model = linen.Sequential([linen.Dense(6), linen.Dense(3)])
    batches = jnp.asarray(rng.standard_normal((2, 2, 8)), jnp.float32)
    params = model.init(jax.random.key(int(rng.integers(2**31))), batches[0])["params"]
    settings = {"subspace": "inputs", "energy": 1.0, "kernels": ogpsa_jax.flax_kernels}
    tx = ogpsa_jax.ogpsa(optax.adam(1e-2), 8, placement="both", **settings)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    collect = ogpsa_jax.linen.collect_inputs(
        lambda params, x: model.apply({"params": params}, x), mask=lambda x: x[..., 0] == x[..., 0]
    )
    moments = jax.jit(lambda p, b: input_moments(collect, p, b))(params, batches[:, :1])
    state = refresh(state, moments=moments)

    def loss_fn(params, batch):
        return jnp.mean((model.apply({"params": params}, batch) - 1.0) ** 2)

    batch = jnp.asarray(rng.standard_normal((4, 8)), jnp.float32)
    new = jax.jit(lambda s: s.apply_gradients(grads=jax.grad(loss_fn)(s.params, batch)))(state)
    kernels = [tree["layers_0"]["kernel"] for tree in (new.params, state.params)]
    assert seen(kernels[0] - kernels[1], batches[:, 0]) < 1e-5


@pytest.mark.parametrize("partitioned", [False, True])
def test_linen_train_state(rng, partitioned):
    init = linen.initializers.lecun_normal()
    if partitioned:
        init = linen.with_partitioning(init, (None, "fsdp"))
    model = linen.Dense(8, kernel_init=init)
    batches = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
    variables = model.init(jax.random.key(int(rng.integers(2**31))), batches[0])
    tx = optax.chain(ogpsa_project(1, scope="global"), optax.sgd(0.1))
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    def loss_fn(params, batch):
        return jnp.mean((model.apply({"params": params}, batch) - 1.0) ** 2)

    @jax.jit
    def step(state, reference, batch):
        references = reference_gradients(loss_fn, state.params, [reference[None]])
        state = refresh(state, references)
        new = state.apply_gradients(grads=jax.grad(loss_fn)(state.params, batch))
        moved = jax.tree.map(jnp.subtract, new.params, state.params)
        return new, first_order_change(references, moved)

    state, change = step(state, batches[0], batches[1])
    np.testing.assert_allclose(change, 0.0, atol=1e-4)  # differences of parameters, in float32
    assert int(diagnostics(state)["refreshes"]) == 1
    if partitioned:
        assert isinstance(state.opt_state[0].basis[0]["kernel"], linen.Partitioned)


@pytest.mark.parametrize("first", ["ogpsa_jax", "flax"])
def test_a_state_is_serialised_whichever_is_imported_first(first, tmp_path):
    imports = ["import ogpsa_jax", "import flax.serialization"]
    program = """
import jax, jax.numpy as jnp, optax
from ogpsa_jax import ogpsa_project, push_reference, refresh
params = {"w": jnp.ones((3, 2)), "steps": jnp.zeros([], jnp.int32)}
tx = optax.chain(ogpsa_project(2), optax.adam(0.1))
state = refresh(tx.init(params), [{"w": jnp.arange(6.0).reshape(3, 2), "steps": params["steps"]}])
"""
    restored = """
data = flax.serialization.to_bytes(state)
new = flax.serialization.from_bytes(tx.init(params), data)
assert jax.tree.structure(new) == jax.tree.structure(state)
assert jax.tree.all(jax.tree.map(jnp.array_equal, new, state))
assert new[0].settings == state[0].settings
"""
    if first == "ogpsa_jax":  # the state, too, is older than flax
        program = "\n".join([imports[0], program, imports[1], restored])
    else:
        program = "\n".join([imports[1], imports[0], program, restored])
    environment = {**os.environ, "PYTHONPATH": str(Path(ogpsa_jax.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_a_state_dict_of_other_shape_is_refused(rng):
    from flax import serialization

    params = {"w": jnp.ones((3, 2))}
    state = TrainState.create(apply_fn=None, params=params, tx=ogpsa_project(2))
    found = serialization.to_state_dict(state)
    assert found["opt_state"]["basis"]["1"]["w"].shape == (3, 2)
    again = serialization.from_state_dict(state, found)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, again, state))
    other = TrainState.create(apply_fn=None, params=params, tx=ogpsa_project(3))
    with pytest.raises(ValueError, match="opt_state/basis"):
        serialization.from_state_dict(other, found)
    del found["opt_state"]["metric"]
    with pytest.raises(
        ValueError, match=r"OgpsaState: expected the fields .*\bmetric\b.*, got (?!.*\bmetric\b)"
    ):
        serialization.from_state_dict(state, found)
