"""How long update and refresh take to compile: Qwen2.5-7B on 256 devices; 300 leaves at rank 16.

    python scripts/bench_compile.py
    python scripts/bench_compile.py --depths 4,28     # the trainer's step alone, by layers

Compiles from shapes alone, for simulated host devices; allocates and runs nothing. Prints wall and
processor time, and what the compiled programs send between devices.
"""

import argparse
import math
import os
import re
import time

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def qwen(stacked: bool):
    """Shapes and specs of Qwen2.5-7B, its 28 layers stacked or apart."""
    d, kv, hidden, vocabulary, layers = 3584, 512, 18944, 152064, 28
    column, row, flat = ("fsdp", "tensor"), ("tensor", "fsdp"), ()
    layer = {
        "q": ((d, d), column), "k": ((d, kv), column), "v": ((d, kv), column), "o": ((d, d), row),
        "gate": ((d, hidden), column), "up": ((d, hidden), column), "down": ((hidden, d), row),
        "q_bias": ((d,), ("tensor",)), "k_bias": ((kv,), ("tensor",)),
        "v_bias": ((kv,), ("tensor",)), "norm1": ((d,), flat), "norm2": ((d,), flat),
    }  # fmt: skip
    tree = {"embedding": ((vocabulary, d), row), "head": ((d, vocabulary), column)}
    tree["norm"] = ((d,), flat)
    if stacked:
        tree |= {f"layers/{n}": ((layers, *s), (None, *p)) for n, (s, p) in layer.items()}
    else:
        tree |= {f"layer{i}/{n}": leaf for i in range(layers) for n, leaf in layer.items()}
    return tree


def abstract(tree, mesh=None):
    def place(shape, spec):
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    return {name: place(*leaf) for name, leaf in tree.items()}


def report(label, program, *arguments, donate=()) -> None:
    wall, processor = time.perf_counter(), time.process_time()
    compiled = jax.jit(program, donate_argnums=donate).lower(*arguments).compile()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    text = compiled.as_text()
    found: dict[str, list[int]] = {}
    for shapes, name in COLLECTIVE.findall(text):
        dims = re.findall(r"\w+\[([\d,]*)\]", shapes)
        size = sum(4 * math.prod(int(d) for d in each.split(",") if d) for each in dims)
        found.setdefault(name, []).append(size)
    sent = ", ".join(f"{len(s)} {n} of at most {max(s):,} bytes" for n, s in sorted(found.items()))
    print(
        f"{label:44s} {wall:6.1f} s wall, {processor:6.1f} s processor; "
        f"{text.count(' = '):,} instructions; {sent or 'no collective'}",
        flush=True,
    )


def programs(label, params, rank, count, **settings) -> None:
    tx = ogpsa_project(rank, **settings)
    state = jax.eval_shape(tx.init, params)
    # eval_shape forgets shardings: the basis has the parameters', the small arrays are whole.
    shardings = {name: leaf.sharding for name, leaf in params.items()}
    basis = tuple(
        {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
            for name, leaf in tree.items()
        }
        for tree in state.basis
    )
    state = dataclasses.replace(state, basis=basis)
    report(f"{label}, update", tx.update, params, state, donate=(0, 1))
    report(f"{label}, refresh", refresh, state, [params] * count, donate=0)


def compile_steps(depths: list[int], rounds: int) -> None:
    """The paper's step of models that differ in their layers alone, in turns."""
    steps = {}
    for layers in depths:
        model = nnx.eval_shape(lambda n=layers: Decoder(bench.qwen2(n, 512), rngs=nnx.Rngs(0)))
        network = Network.of(model)
        config = bench.configuration(["ogpsa.preset=paper"])
        optimizer = make_optimizer(config, total_steps=100)
        state = TrainState(network.trained, jax.eval_shape(optimizer.init, network.trained))
        batch = jax.eval_shape(lambda: bench.random_batch(0, (2, 4, 128), 32000))

        def compiled(rest=(network.graphdef, optimizer, state, network.frozen, batch)):
            graphdef, optimizer, *shapes = rest
            make_train_step(graphdef, sft_loss, optimizer).lower(*shapes).compile()

        steps[f"{layers} layers"] = compiled
    seconds = bench.take_turns(steps, rounds)
    for name, found in seconds.items():
        beside = bench.spread(bench.ratios(found, seconds[f"{depths[0]} layers"]))
        print(f"{name}: {bench.spread(found, 1)} CPU seconds, {beside} of the first")


def main() -> None:
    print(bench.machine())
    mesh = jax.make_mesh((64, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        for stacked in (True, False):
            params = abstract(qwen(stacked), mesh)
            label = f"Qwen2.5-7B, 256 devices, {len(params)} leaves, k=2"
            programs(label, params, 2, 2, stacked={"layers": 0} if stacked else None)
    leaves = {f"leaf{i}": ((256 + 32 * (i % 10), 128), ()) for i in range(300)}
    programs("300 leaves of 10 shapes, one device, k=16", abstract(leaves), 16, 16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depths", help="of the trainer's step, comma-separated")
    parser.add_argument("--rounds", type=int, default=2, help="of --depths")
    OPTIONS = parser.parse_args()
    if not OPTIONS.depths:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"
    import dataclasses

    import bench_common as bench
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from ogpsa_jax import ogpsa_project, refresh
    from ogpsa_jax.models import Decoder
    from ogpsa_jax.objectives.sft import sft_loss
    from ogpsa_jax.training.optimizer import make_optimizer
    from ogpsa_jax.training.step import Network, TrainState, make_train_step

    if OPTIONS.depths:
        compile_steps([int(depth) for depth in OPTIONS.depths.split(",")], OPTIONS.rounds)
    else:
        main()
