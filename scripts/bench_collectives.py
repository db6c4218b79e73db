"""What projection costs in memory and communication: the step of a 7B model, compiled, not run.

    pip install '.[plan]'                  # the compiler for TPUs, libtpu; no TPU is needed
    python scripts/bench_collectives.py ogpsa.preset=recommended

Compiles the trainer's step for described devices, with the projection and with `ogpsa.preset=off`,
from shapes alone, without weights or data, in minutes. A loop's body counts as often as it runs.

    python scripts/bench_collectives.py --on cpu --model configs/models/tiny         # quick
"""

import argparse
import importlib.metadata
import importlib.util
import math
import os
import sys
import time
from functools import partial
from typing import Any

from hlo import KINDS, Collective, collectives

SCOPE = "ogpsa_projection"  # the name that the projection gives its operations
MIB = 2**20
FEWEST_KEPT = 8  # predictions of the initial model, where references.top_k leaves it to the error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/qwen2.5-7b-sft-recommended.yaml")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, as for ogpsa-jax train")
    parser.add_argument("--model", default="configs/models/qwen2.5-7b", help="with a config.json")
    parser.add_argument("--on", default="v5p:2x2x2", help="TPU topology, or cpu: host devices")
    return parser.parse_intermixed_args()  # overrides may stand anywhere


def described_mesh(section: Any, on: str) -> Any:
    """The mesh of a configuration over described devices."""
    sizes = [section.data, section.fsdp, section.tensor]
    topology = None
    if on == "cpu":
        count = jax.device_count()
    else:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                f"--on: {on} needs the compiler for TPUs; `pip install '.[plan]'` in a clone, or "
                "take --on cpu."
            )
        topology = topologies.get_topology_desc(platform="tpu", topology_name=on)
        count = len(topology.devices)
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    axes, kinds = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    if topology is None:
        return jax.make_mesh(sizes, axes, axis_types=kinds)
    return Mesh(topologies.make_mesh(topology, sizes, axes).devices, axes, axis_types=kinds)


def placed(tree: Any, mesh: Any) -> Any:
    """The same shapes and shardings on this mesh; arrays without a sharding are replicated."""

    def place(leaf: Any) -> Any:
        spec = getattr(leaf.sharding, "spec", PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def replaying(config: Any) -> Any:
    """The optimizer of the run, with its replay and without its projection."""
    off = config.model_copy(update={"ogpsa": config.ogpsa.model_copy(update={"preset": "off"})})
    inner, weight = make_optimizer(off, total_steps=100), config.references.in_step.replay_weight

    def update(updates: Any, state: Any, params: Any, *, reference: Any) -> Any:
        return inner.update(
            jax.tree.map(lambda g, r: g + weight * r, updates, reference), state, params
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


def abstract_step(config: Any, optimizer: Any, model_folder: str, mesh: Any) -> Any:
    """The trainer's step for a configuration, and the shapes and shardings of its arguments."""
    architecture = read_config(Path(model_folder))
    model = nnx.eval_shape(
        lambda: Decoder(
            architecture,
            rngs=nnx.Rngs(0),
            dtype=config.model.dtype,
            param_dtype=config.model.param_dtype,
            remat=config.train.remat,
            mesh=mesh,
        )
    )
    network = Network.of(model)
    where = nnx.to_pure_dict(param_shardings(model, mesh, model.placement.rules))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), network.trained, where
    )
    # Traced with explicit axes, arrays say how they are split, as those do that are really there.
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )
    with jax.sharding.use_abstract_mesh(explicit):
        opt_state = jax.eval_shape(optimizer.init, placed(params, explicit))
    loss = partial(sft_loss, chunk_size=config.train.loss_chunk)
    in_step_rows = config.reference_rows
    distilled = config.references.target == "initial"
    reference_loss = distillation_loss if distilled else sft_loss
    step = make_train_step(
        network.graphdef,
        loss,
        optimizer,
        reference_loss=partial(reference_loss, chunk_size=config.train.loss_chunk)
        if in_step_rows
        else None,
    )
    state = TrainState(params, placed(opt_state, mesh))
    batches = [abstract_batch(config, config.train.batch_size - in_step_rows, mesh)]
    if in_step_rows:
        batches.append(abstract_batch(config, in_step_rows, mesh, distilled=distilled))
    return step, [state, network.frozen, *batches]


def abstract_batch(config: Any, rows: int, mesh: Any, *, distilled: bool = False) -> dict[str, Any]:
    each = rows_per_micro_batch(rows, config.train.micro_batch_size, mesh)
    shape = (rows // each, each, config.data.max_length)
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    tokens = ("input_ids", "segment_ids", "positions")
    arrays: dict[str, Any] = dict.fromkeys(tokens, (shape, jnp.int32))
    arrays["loss_mask"] = (shape, jnp.bool_)
    if distilled:
        kept = (*shape, config.references.top_k or FEWEST_KEPT)
        arrays |= {"teacher_ids": (kept, jnp.int32), "teacher_log_probs": (kept, jnp.float32)}
        arrays["teacher_rest"] = (shape, jnp.float32)
    return {
        name: jax.ShapeDtypeStruct(size, dtype, sharding=sharding)
        for name, (size, dtype) in arrays.items()
    }


def state_bytes(state: Any) -> dict[str, tuple[int, int]]:
    """By kind: bytes on one device, and of all devices together, each part counted once."""
    found: dict[str, tuple[int, int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        kind = "other"
        if name.startswith(".params"):
            kind = "parameters"
        elif ".mu" in name or ".nu" in name:
            kind = "moments"
        elif ".basis" in name or ".metric" in name:
            kind = "basis"
        width = leaf.dtype.itemsize
        here = math.prod(leaf.sharding.shard_shape(leaf.shape)) * width
        before = found.get(kind, (0, 0))
        found[kind] = (before[0] + here, before[1] + math.prod(leaf.shape) * width)
    return found


def compiled_figures(config: Any, optimizer: Any, model: str, mesh: Any) -> dict[str, Any]:
    step, inputs = abstract_step(config, optimizer, model, mesh)
    start = time.perf_counter()
    compiled = step.lower(*inputs).compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "state": state_bytes(inputs[0]),
        "opt_state": inputs[0].opt_state,
        "temporaries": memory.temp_size_in_bytes,
        "peak": held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
        "seconds": time.perf_counter() - start,
    }


def sums(found: list[Collective]) -> dict[str, int]:
    total: dict[str, int] = dict.fromkeys(KINDS, 0)
    for one in found:
        total[one.kind] += one.size * one.times
    return total


def print_table(title: str, columns: list[str], rows: dict[str, list[float]]) -> None:
    print(f"\n{title:26s}" + "".join(f"{column:>13s}" for column in columns))
    for name, values in rows.items():
        print(f"{name:26s}" + "".join(f"{value / MIB:13,.2f}" for value in values))


def report(figures: dict[str, dict[str, Any]], placements: int) -> None:
    sides = list(figures.values())
    memory = {
        kind: [side["state"].get(kind, (0, 0))[0] for side in sides]
        for kind in ("parameters", "moments", "basis", "other")
    } | {name: [side[name] for side in sides] for name in ("temporaries", "peak")}
    print_table("MiB on each device", list(figures), memory)
    basis, params = (sides[-1]["state"].get(kind, (0, 0)) for kind in ("basis", "parameters"))
    print(
        f"\nthe basis takes {basis[0] / params[0]:.3f} of the parameters' bytes on each device, "
        f"{basis[1] / params[1]:.3f} if every part is counted once"
    )
    by_side = [sums(side["collectives"]) for side in sides]
    sent = {kind: [side[kind] for side in by_side] for kind in KINDS}
    sent["all"] = [sum(side.values()) for side in by_side]
    rows = {name: [*values, values[-1] - values[-2]] for name, values in sent.items()}
    print_table("MiB a step, each device", [*figures, "projection"], rows)
    states = [s for s in find_states(sides[-1]["opt_state"]) if isinstance(s, InputState)]
    bases = [u for state in states for u in state.basis.values()]
    if bases:
        whole = sum(math.prod(u.shape) * u.dtype.itemsize for u in bases)
        layer = max(math.prod(u.shape[-2:]) * u.dtype.itemsize for u in bases)
        print(
            f"\ngathering U of every layer once for each of {placements} placement(s): "
            f"{placements * whole / MIB:,.2f} MiB; the largest U of a layer: {layer / MIB:,.2f} MiB"
        )
    own = [one for one in sides[-1]["collectives"] if SCOPE in one.scope]
    print("largest of the projection:")
    for one in sorted(own, key=lambda one: -one.size)[:5]:
        print(f"  {one.size / MIB:10.3f} MiB x {one.times:4d}  {one.kind} {one.array[:60]}")


def main() -> None:
    projected = load_config(OPTIONS.config, OPTIONS.overrides)
    off = load_config(OPTIONS.config, [*OPTIONS.overrides, "ogpsa.preset=off"])
    if projected.objective != "sft" or projected.model.lora is not None:
        raise InputError(f"{OPTIONS.config}: needs objective: sft and model.lora: null.")
    mesh = described_mesh(projected.mesh, OPTIONS.on)
    compiler = f"libtpu {importlib.metadata.version('libtpu')}" if OPTIONS.on != "cpu" else "cpu"
    print(
        f"{OPTIONS.model} on {OPTIONS.on}: {mesh.size} x {mesh.devices.flat[0].device_kind}, "
        f"{dict(mesh.shape)}; jax {jax.__version__}, {compiler}"
    )
    ogpsa, train = projected.ogpsa, projected.train
    print(
        f"{train.batch_size} rows of {projected.data.max_length} tokens a step, "
        f"{projected.reference_rows} of them references; rank {ogpsa.rank}, placement "
        f"{ogpsa.placement}, basis {ogpsa.basis_dtype or projected.model.param_dtype}"
    )
    wanted = {"off": (off, make_optimizer(off, total_steps=100))}
    if projected.reference_rows:
        wanted["replay alone"] = (projected, replaying(projected))
    wanted["projected"] = (projected, make_optimizer(projected, total_steps=100))
    figures = {}
    for name, (config, optimizer) in wanted.items():
        figures[name] = compiled_figures(config, optimizer, OPTIONS.model, mesh)
        print(f"{name}: compiled in {figures[name]['seconds']:.0f} s", flush=True)
    report(figures, placements=2 if ogpsa.placement == "both" else 1)


if __name__ == "__main__":
    OPTIONS = arguments()
    if OPTIONS.on == "cpu":
        os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    # The compiler asks neither a device nor, for what it compiles, the network.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", OPTIONS.on.partition(":")[0] + "-8")
    from pathlib import Path

    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

    from ogpsa_jax.errors import InputError
    from ogpsa_jax.models import Decoder, param_shardings
    from ogpsa_jax.models.config import read_config
    from ogpsa_jax.objectives.distillation import distillation_loss
    from ogpsa_jax.objectives.sft import sft_loss
    from ogpsa_jax.projection.find import find_states
    from ogpsa_jax.projection.input_state import InputState
    from ogpsa_jax.training.config_file import load_config
    from ogpsa_jax.training.mesh import ROWS, rows_per_micro_batch
    from ogpsa_jax.training.optimizer import make_optimizer
    from ogpsa_jax.training.step import Network, TrainState, make_train_step

    try:
        main()
    except InputError as error:
        print(f"bench_collectives: {error}", file=sys.stderr)
        sys.exit(2)
