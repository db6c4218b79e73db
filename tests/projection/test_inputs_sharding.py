"""Subspaces of inputs on eight devices: one device's numbers, and what travels.

U is split over what splits all its kernels. Kernels that are split over their outputs project with
no other collective than gathering U layer by layer, and sums of squares for the diagnostics. Split
over their inputs, they sum coefficients ``[r, out]``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ogpsa_jax import Kernel, column_adamw, diagnostics, ogpsa_project, refresh, second_moment

from .helpers import assert_close
from .test_sharding import collectives

KERNELS = {
    "dense": Kernel(),
    r"layers.*(q|v)": Kernel("attention", stacked=(0,)),
    r"layers.*'o'": Kernel("output", axes=(1, 2), stacked=(0,)),
}
SHAPES = {
    "dense": (16, 8),
    "layers/q": (3, 16, 24),
    "layers/v": (3, 16, 8),
    "layers/'o'": (3, 4, 4, 16),
    "bias": (8,),
}
OUTPUTS = {"dense": (None, "fsdp"), "layers/q": (None, None, ("fsdp", "tensor"))}
OUTPUTS |= {"layers/v": (None, None, "fsdp"), "layers/'o'": (None, None, None, "fsdp")}
INPUTS = {"dense": ("fsdp",), "layers/q": (None, "fsdp", "tensor"), "layers/v": (None, "fsdp")}
INPUTS |= {"layers/'o'": (None, "tensor", None, "fsdp")}
SPECS = {"outputs": OUTPUTS, "inputs": INPUTS}
RANK = 8


def tree(rng):
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


def moments(rng):
    def of(*shape):
        x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        return second_moment(x) if x.ndim == 2 else jax.vmap(second_moment)(x)

    names = {"dense": (5, 16), "attention": (3, 5, 16), "output": (3, 5, 16)}
    return {name: of(*shape) for name, shape in names.items()}


def place(tree, where, specs):
    return {
        name: jax.device_put(leaf, NamedSharding(where, PartitionSpec(*specs.get(name, ()))))
        for name, leaf in tree.items()
    }


@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("optimizer", ["sgd", "column_adamw"])
def test_eight_devices_equal_one(rng, layout, kind, optimizer):
    last = optax.sgd(1.0) if optimizer == "sgd" else column_adamw(1.0, kernels=KERNELS)
    tx = optax.chain(ogpsa_project(RANK, subspace="inputs", energy=1.0, kernels=KERNELS), last)
    params, gradient, found = tree(rng), tree(rng), moments(rng)
    state = jax.jit(refresh)(tx.init(params), moments=found)
    alone, _ = jax.jit(tx.update)(gradient, state, params)
    where = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))
    with jax.set_mesh(where):
        params, gradient = (place(t, where, SPECS[layout]) for t in (params, gradient))
        empty = tx.init(params)
        state = jax.jit(refresh)(empty, moments=found)
        for name, basis in state[0].basis.items():
            wanted = empty[0].basis[name].sharding
            assert basis.sharding.is_equivalent_to(wanted, basis.ndim)
            # Over fsdp at least, which splits all kernels.
            assert np.prod(wanted.shard_shape(basis.shape)) * 4 <= basis.size, name
        compiled = jax.jit(tx.update).lower(gradient, state, params).compile()
        updates, state = compiled(gradient, state, params)
        if layout == "outputs" and optimizer == "sgd":
            for _, size in collectives(compiled):
                # Sums of squares for the diagnostics; and no layer's U is larger than this.
                assert size <= 16 * RANK * 4
    for name, leaf in updates.items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
    # Adam's first step is ±1 by entry: where a sum is nearly zero, round-off decides. Sums of
    # squares over columns make that rare; sums in another order are off by some float32 units.
    assert_close(jax.device_get(updates), alone, 2e-5)
    assert int(diagnostics(state)["refreshes"]) == 1


def test_moments_of_sharded_rows(rng):
    x = jnp.asarray(rng.standard_normal((16, 4, 6)), jnp.float32)
    for kind in (AxisType.Auto, AxisType.Explicit):
        where = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
        with jax.set_mesh(where):
            rows = jax.device_put(x, NamedSharding(where, PartitionSpec("fsdp")))
            found = jax.jit(second_moment)(rows)
        assert_close(jax.device_get(found.product), second_moment(x).product, 1e-6)
        np.testing.assert_allclose(found.trace, second_moment(x).trace, rtol=1e-6)
