"""What a program sends: kinds, bytes, and loops counted as often as they run."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ogpsa_jax.planning import hlo


def test_a_gather_in_a_loop_counts_as_often_as_the_loop_runs():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((None, "fsdp"), ()))

    def step(x: jax.Array, layers: jax.Array) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole)), None

        return jax.lax.scan(layer, x, layers)[0].sum()

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    layers = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=split)
    text = jax.jit(step).lower(x, layers).compile().as_text()
    found = [one for one in hlo.collectives(text) if one.kind == "all-gather"]
    assert [(one.size, one.times) for one in found] == [(16 * 16 * 4, 5)]
    # TPU programs do not say how often a loop runs: it is read from its counter.
    untold = hlo._KNOWN.sub("", text)
    assert untold != text
    assert hlo.collectives(untold) == hlo.collectives(text)
    # Attributes of a TPU kernel are printed over several lines.
    kernel = (
        '  %kernel = f32[] custom-call(), attributes={kernel={\n"block": 512\n}}, metadata={}\n'
    )
    several = text.replace("\n  ROOT ", f"\n{kernel}  ROOT ")
    assert several != text
    assert hlo.collectives(several) == hlo.collectives(text)
