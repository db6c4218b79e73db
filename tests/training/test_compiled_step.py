"""What the compiled step holds: collectives and buffers, read from its program."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ogpsa_jax.models import Decoder
from ogpsa_jax.models.config import read_config
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.projection.find import find_states
from ogpsa_jax.training.mesh import replicate_rest, shard_rows
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.prepare import model_config, prepare_data, prepare_model
from ogpsa_jax.training.step import Network, TrainState, make_train_step
from ogpsa_jax.training.workload import prepare_workload

from .conftest import TINY, some_devices

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(program: str) -> Counter[tuple[str, int]]:
    """(kind, bytes) of every array that a collective of the program gives out."""
    found: Counter[tuple[str, int]] = Counter()
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            for kind, dims in ARRAY.findall(match[1]):
                count = int(np.prod([int(d) for d in dims.split(",") if d]))
                found[match[2], SIZES[kind] * count] += 1
    return found


def compiled_step(config: Any) -> tuple[str, Any]:
    """The program, and the optimizer state that it takes."""
    mesh = some_devices(config.mesh)
    workload = prepare_workload(config, prepare_data(config, model_config(config)), mesh)
    network = Network.of(prepare_model(config, mesh))
    optimizer = make_optimizer(config, 10)
    state = TrainState(network.trained, replicate_rest(optimizer.init(network.trained), mesh))
    step = make_train_step(network.graphdef, workload.objective, optimizer)
    batch = shard_rows(workload.batches.batch(0), mesh)
    program = str(step.lower(state, network.frozen, batch).compile().as_text())
    return program, state.opt_state


def test_the_projection_adds_no_gather_and_no_large_collective(configured):
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    plain = collectives(compiled_step(configured(Path("none"), *mesh, "ogpsa.preset=off"))[0])
    projected = collectives(compiled_step(configured(Path("none"), *mesh, "ogpsa.rank=4"))[0])
    assert any(kind == "all-gather" for kind, _ in plain)  # those of fsdp: the parser sees them
    added = projected - plain
    assert added
    assert not [kind for kind, _ in added if kind != "all-reduce"], added
    assert max(size for _, size in added) <= 4096, added


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 8, 1), (2, 2, 2)])
def test_a_subspace_of_inputs_sends_no_more_than_its_basis_layer_by_layer(
    configured, data, fsdp, tensor
):
    mesh = [f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"]
    inputs = ["ogpsa={preset: recommended, rank: 8}", "references.in_step=null"]
    plain, _ = compiled_step(configured(Path("none"), *mesh, "ogpsa.preset=off"))
    projected, opt_state = compiled_step(configured(Path("none"), *mesh, *inputs))
    (state,) = find_states(opt_state)
    for basis in state.basis.values():  # no device of those that share the weights keeps another's
        held = np.prod(basis.sharding.shard_shape(basis.shape))
        assert held * fsdp * tensor == basis.size, basis.sharding.spec
    # Of every U in one layer; the smallest gradient of a layer's kernel is larger.
    widest = max(int(np.prod(u.shape[-2:])) for u in state.basis.values()) * 4
    assert widest < 4 * min(int(np.prod(kernel.shape[-2:])) for kernel in state.settings.kernels)
    added = collectives(projected) - collectives(plain)
    assert any(kind == "all-gather" for kind, _ in added)
    # With all three axes the compiler also permutes the shards of a U that it gathers.
    allowed = ("all-gather", "all-reduce", *(["collective-permute"] if data > 1 else []))
    assert not [kind for kind, _ in added if kind not in allowed], added
    assert max(size for _, size in added) <= widest, added
    if tensor == 1:  # the products with U are local, so what is summed are squared norms
        assert max(size for kind, size in added if kind == "all-reduce") <= 64, added


@pytest.mark.parametrize("chunk", [16, 100])
def test_no_buffer_of_batch_by_length_by_vocabulary_exists(chunk):
    rows, length, vocabulary = 3, 112, 260
    model = Decoder(read_config(TINY), rngs=nnx.Rngs(0), dtype="float32")
    graphdef, params = nnx.split(model)
    batch = {
        "input_ids": jnp.ones((rows, length), jnp.int32),
        "segment_ids": jnp.ones((rows, length), jnp.int32),
        "positions": jnp.tile(jnp.arange(length), (rows, 1)),
        "loss_mask": jnp.ones((rows, length), bool),
    }

    def loss(params: Any, chunk_size: int) -> jax.Array:
        return sft_loss(nnx.merge(graphdef, params), batch, chunk_size=chunk_size)[0]

    def largest(chunk_size: int) -> int:
        program = jax.jit(jax.grad(loss), static_argnums=1).lower(params, chunk_size).compile()
        arrays = re.findall(r"f32\[([\d,]+)\]", program.as_text())
        with_vocabulary = [
            int(np.prod(dims))
            for dims in ([int(d) for d in text.split(",")] for text in arrays)
            if vocabulary in dims and int(np.prod(dims)) > vocabulary * model.config.hidden_size
        ]
        return max(with_vocabulary, default=0)

    assert largest(length) >= rows * length * vocabulary  # unchunked, the test sees it
    assert largest(chunk) <= rows * chunk * vocabulary
