"""The head over a mesh: one device's losses and gradients, whichever way sends less."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from ogpsa_jax.models import Decoder
from ogpsa_jax.models.config import read_config
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.planning.hlo import collectives
from ogpsa_jax.training.mesh import shard_rows

from .conftest import TINY

ROWS = 8
EXCHANGED, GATHERED = 24, 72  # tokens a row: 8 rows have fewer than the vocabulary twice, or more


def mesh_of(*sizes: int) -> Mesh:
    axes = ("data", "fsdp", "tensor")
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)


def loss_and_gradient(mesh: Mesh | None, length: int, *, tied: bool, chunk: int = 8) -> Any:
    """The jitted function, and its arguments."""
    config = dataclasses.replace(read_config(TINY), tie_word_embeddings=tied)
    assert ROWS * EXCHANGED <= 2 * config.vocab_size < ROWS * GATHERED
    model = Decoder(config, rngs=nnx.Rngs(0), dtype="float32", mesh=mesh)
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(0)
    shape = (1, ROWS, length)
    batch: dict[str, Any] = {
        "input_ids": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "loss_mask": rng.random(shape) < 0.7,
    }
    batch = jax.tree.map(jnp.asarray, batch) if mesh is None else shard_rows(batch, mesh)
    objective = partial(sft_loss, chunk_size=chunk)

    @jax.jit
    @jax.value_and_grad
    def function(params: Any, batch: Any) -> jax.Array:
        return objective(nnx.merge(graphdef, params), batch)[0]

    return function, (params, jax.tree.map(lambda x: x[0], batch))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (2, 1, 1), (1, 1, 4)])
@pytest.mark.parametrize("length", [EXCHANGED, GATHERED])
@pytest.mark.parametrize("tied", [True, False])
def test_losses_and_gradients_are_those_of_one_device(sizes, length, tied):
    function, args = loss_and_gradient(None, length, tied=tied)
    loss, wanted = function(*args)
    function, args = loss_and_gradient(mesh_of(*sizes), length, tied=tied)
    found, gradient = function(*args)
    assert float(found) == pytest.approx(float(loss), rel=1e-5)
    for ours, theirs, param in zip(*map(jax.tree.leaves, (gradient, wanted, args[0])), strict=True):
        assert ours.sharding.is_equivalent_to(param.sharding, ours.ndim)
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("tied", [True, False])
def test_the_kernel_is_sent_once_however_many_chunks_there_are(tied):
    def sent(chunk: int) -> int:
        function, args = loss_and_gradient(mesh_of(1, 8, 1), GATHERED, tied=tied, chunk=chunk)
        found = collectives(function.lower(*args).compile().as_text())
        kernel = read_config(TINY).vocab_size * read_config(TINY).hidden_size * 4
        return sum(one.times for one in found if one.size >= kernel // 8 and "lm_head" in one.scope)

    assert 0 < sent(GATHERED) == sent(4)
