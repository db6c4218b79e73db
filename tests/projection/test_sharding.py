"""Sharded means sharded: eight devices give one device's numbers, and move next to nothing."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ogpsa_jax import ogpsa_project, push_reference, refresh

from .helpers import assert_close

SHAPES = {
    "embedding": (64, 16),
    "up": (16, 64),
    "layers": (3, 16, 32),  # stacked, and the stack itself whole
    "norm": (17,),
    "scalar": (),
}
SPECS = {
    "fsdp": {"embedding": ("fsdp",), "up": ("fsdp",), "layers": (None, "fsdp")},
    "tensor": {
        "embedding": (None, "tensor"),
        "up": (None, "tensor"),
        "layers": (None, None, "tensor"),
    },
    "mixed": {
        "embedding": (("fsdp", "tensor"),),
        "up": ("fsdp", "tensor"),
        "layers": (None, "tensor", "fsdp"),
    },
}
RANK = 2
# What a step may reduce over devices: k + 2 numbers a group, so some hundred bytes here.
MOST_BYTES = 4096
FORBIDDEN = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def mesh(kind):
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(kind, kind))


def random_tree(rng):
    return {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()}


def place(tree, where, specs):
    return {
        name: jax.device_put(leaf, NamedSharding(where, PartitionSpec(*specs.get(name, ()))))
        for name, leaf in tree.items()
    }


def transformation(scope):
    return optax.chain(ogpsa_project(RANK, scope=scope, stacked={"layers": 0}), optax.sgd(1.0))


def collectives(compiled):
    """Names and sizes in bytes of the collective operations in the compiled program."""
    widths = {"pred": 1, "s32": 4, "u32": 4, "f32": 4, "bf16": 2, "f16": 2}
    found = []
    pattern = (
        r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
    )
    for shapes, name, _ in re.findall(pattern, compiled.as_text()):
        size = 0
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
            size += widths[dtype] * math.prod(int(d) for d in dims.split(",") if d)
        found.append((name, size))
    return found


def assert_moves_next_to_nothing(compiled):
    found = collectives(compiled)
    assert found, "a sharded sum without any all-reduce: the pattern reads this HLO no more"
    for name, size in found:
        assert name not in FORBIDDEN
        assert size <= MOST_BYTES


def prepare(state, references, third):
    return push_reference(refresh(state, references), third)


@pytest.mark.parametrize(
    ("layout", "kind", "scope"),
    [
        ("fsdp", AxisType.Auto, "tensor"),
        ("fsdp", AxisType.Explicit, "global"),
        ("tensor", AxisType.Auto, "global"),
        ("mixed", AxisType.Explicit, "tensor"),
    ],
)
def test_eight_devices_equal_one_and_only_scalars_travel(rng, layout, kind, scope):
    tx = transformation(scope)
    params, gradient, first, second, third = (random_tree(rng) for _ in range(5))
    whole = jax.device_get(gradient)
    state = jax.jit(prepare)(tx.init(params), [first, second], third)
    alone, _ = jax.jit(tx.update)(gradient, state, params)
    where = mesh(kind)
    with jax.set_mesh(where):
        params, gradient, first, second, third = (
            place(tree, where, SPECS[layout]) for tree in (params, gradient, first, second, third)
        )
        state = tx.init(params)
        compiled = jax.jit(prepare).lower(state, [first, second], third).compile()
        assert_moves_next_to_nothing(compiled)
        state = compiled(state, [first, second], third)
        for tree in state[0].basis:
            for name, leaf in tree.items():
                assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)
        compiled = jax.jit(tx.update).lower(gradient, state, params).compile()
        assert_moves_next_to_nothing(compiled)
        updates, _ = compiled(gradient, state, params)
    # Sums in another order: round-off of a few hundred terms. Of what was projected, not of what is
    # left: of a scalar, whose only direction is taken, that is round-off alone. Of one group, what
    # is taken from a small leaf is as uncertain as the largest makes it.
    largest_of = {name: float(np.max(np.abs(value))) for name, value in whole.items()}
    for name, leaf in jax.device_get(updates).items():
        largest = largest_of[name] if scope == "tensor" else max(largest_of.values())
        np.testing.assert_allclose(leaf, alone[name], atol=1e-5 * largest, rtol=0)


def test_uneven_shards_change_nothing(rng):
    # Inside jit a dimension of 17 may lie on four devices; the parameters arrive whole.
    tx = ogpsa_project(RANK)
    params, gradient, first, second = (
        {"w": jnp.asarray(rng.standard_normal((17, 9)), jnp.float32)} for _ in range(4)
    )
    where = mesh(AxisType.Auto)

    def run(params, gradient, first, second, cut):
        trees = [jax.tree.map(cut, tree) for tree in (params, gradient, first, second)]
        state = refresh(tx.init(trees[0]), trees[2:])
        return tx.update(trees[1], state, trees[0])[0]

    def cut(leaf):
        spec = PartitionSpec("fsdp", "tensor")
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(where, spec))

    whole = jax.jit(run, static_argnums=4)(params, gradient, first, second, lambda leaf: leaf)
    with jax.set_mesh(where):
        parts = jax.jit(run, static_argnums=4)(params, gradient, first, second, cut)
    assert_close(jax.device_get(parts), whole, 5e-6)


def test_donated_sharded_state_is_reused_in_place(rng):
    tx = transformation("tensor")
    where = mesh(AxisType.Explicit)
    with jax.set_mesh(where):
        params, gradient = (place(random_tree(rng), where, SPECS["fsdp"]) for _ in range(2))
        state = tx.init(params)
        compiled = (
            jax.jit(tx.update, donate_argnums=(0, 1)).lower(gradient, state, params).compile()
        )
        memory = compiled.memory_analysis()
        held = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((gradient, state))
        )
        assert memory.alias_size_in_bytes >= 0.9 * held
        before = [leaf.unsafe_buffer_pointer() for leaf in _first_shards(state)]
        _, state = compiled(gradient, state, params)
        assert before == [leaf.unsafe_buffer_pointer() for leaf in _first_shards(state)]


def _first_shards(state):
    return [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(state[0].basis)]
