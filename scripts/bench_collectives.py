"""What projection costs in memory and communication: the step of a 7B model, compiled, not run.

    pip install '.[plan]'                  # the compiler for TPUs, libtpu; no TPU is needed
    python scripts/bench_collectives.py ogpsa.preset=recommended

Compiles the trainer's step for described devices, with the projection and with `ogpsa.preset=off`,
from shapes alone: no weights, no data, minutes. A body of a loop counts as often as the loop runs.

    python scripts/bench_collectives.py --on h100:8 --model configs/models/tiny      # quick
"""

import argparse
import math
import sys
import time
from typing import Any

from ogpsa_jax.errors import InputError
from ogpsa_jax.planning.devices import parse_target, planned_mesh, prepare_compiler

SCOPE = "ogpsa_projection"  # the name that the projection gives its operations
MIB = 2**20


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/qwen2.5-7b-sft-recommended.yaml")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, as for ogpsa-jax train")
    parser.add_argument("--model", default="configs/models/qwen2.5-7b", help="has a config.json")
    parser.add_argument("--on", default="v5p:2x2x2", help="as for ogpsa-jax plan")
    return parser.parse_intermixed_args()  # overrides may stand anywhere


def replaying(config: Any) -> Any:
    """The optimizer of the run, with its replay and without its projection."""
    off = config.model_copy(update={"ogpsa": config.ogpsa.model_copy(update={"preset": "off"})})
    inner, weight = make_optimizer(off, total_steps=100), config.references.in_step.replay_weight

    def update(updates: Any, state: Any, params: Any, *, reference: Any) -> Any:
        return inner.update(
            jax.tree.map(lambda g, r: g + weight * r, updates, reference), state, params
        )

    return optax.GradientTransformationExtraArgs(inner.init, update)


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


def compiled_figures(config: Any, optimizer: Any, mesh: Any) -> dict[str, Any]:
    run = abstract_run(config, mesh, optimizer)
    program = run.train_step()
    start = time.perf_counter()
    compiled = program.call.lower(*program.args).compile()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return {
        "state": state_bytes(run.state),
        "opt_state": run.state.opt_state,
        "temporaries": memory.temp_size_in_bytes,
        "peak": held - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "collectives": collectives(compiled.as_text()),
        "seconds": time.perf_counter() - start,
    }


def sums(found: list[Any]) -> dict[str, int]:
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
    model = f"model.path={OPTIONS.model}"
    projected = load_config(OPTIONS.config, [*OPTIONS.overrides, model])
    off = load_config(OPTIONS.config, [*OPTIONS.overrides, model, "ogpsa.preset=off"])
    if projected.objective != "sft":
        raise InputError(f"{OPTIONS.config}: needs objective: sft.")
    mesh = planned_mesh(projected.mesh, TARGET)
    print(
        f"{OPTIONS.model} on {TARGET.name}: {dict(mesh.shape)}; jax {jax.__version__}, compiled "
        f"for {TARGET.compiled_for}"
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
        figures[name] = compiled_figures(config, optimizer, mesh)
        print(f"{name}: compiled in {figures[name]['seconds']:.0f} s", flush=True)
    report(figures, placements=2 if ogpsa.placement == "both" else 1)


if __name__ == "__main__":
    OPTIONS = arguments()
    try:
        TARGET = parse_target(OPTIONS.on)
        prepare_compiler(TARGET)
        import jax
        import optax

        from ogpsa_jax.config import load_config
        from ogpsa_jax.planning.abstract import abstract_run
        from ogpsa_jax.planning.hlo import KINDS, collectives
        from ogpsa_jax.projection.find import find_states
        from ogpsa_jax.projection.input_state import InputState
        from ogpsa_jax.training.optimizer import make_optimizer

        main()
    except InputError as error:
        print(f"bench_collectives: {error}", file=sys.stderr)
        sys.exit(2)
