"""What the projection adds to an AdamW step, beside the least traffic to memory that it needs.

    python scripts/bench_projection.py --sizes 50e6,400e6 --one-thread
    python scripts/bench_projection.py --sizes 4e6 --rounds 3         # in seconds

For each rank and basis dtype, AdamW and chain(ogpsa_project, AdamW) alternate, both with donated
buffers. A round is one step of each; the added time is the difference within the round. The
floor: the gradient and the basis are read for the coefficients, the basis again for the update, at
the rate at which AdamW itself (4 arrays read, 3 written) gets through memory here.
"""

import argparse
import math
import os
import platform
import statistics
import time
from functools import partial


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="50e6", help="parameters, comma-separated")
    parser.add_argument("--ranks", default="1,2,4,8")
    parser.add_argument("--basis-dtypes", default="float32,bfloat16")
    parser.add_argument("--scope", default="tensor", choices=("tensor", "global"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--one-thread", action="store_true", help="pin the process to one core")
    return parser.parse_args()


def make_tree(size: int, key, scale: float = 1.0):
    """Square leaves, about a dozen of them: shapes of a transformer's weights."""
    side = 1 << round(math.log2(math.sqrt(size / 12)))
    count = max(1, round(size / side**2))
    keys = jax.random.split(key, count)
    return {f"layer{i}": scale * jax.random.normal(keys[i], (side, side)) for i in range(count)}


def timed(step, params, state, gradient):
    start = time.perf_counter()
    params, state = jax.block_until_ready(step(params, state, gradient))
    return time.perf_counter() - start, params, state


def compiled_step(tx, params, state, gradient):
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, gradient).compile()


def available_bytes() -> float:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return math.inf


def measure(size: int, rank: int, dtype: str, scope: str, rounds: int) -> None:
    width = jnp.dtype(dtype).itemsize
    # AdamW and the chain each own parameters and moments; beside them one gradient, one reference.
    needed = size * (2 * 12 + 8 + rank * width)
    if jax.default_backend() == "cpu" and needed > 0.95 * available_bytes():
        room = available_bytes() / 2**30
        print(f"{size / 1e6:7.0f} M  {rank:4d}  {dtype:9s} left out: needs "
              f"{needed / 2**30:.1f} GiB, {room:.1f} available", flush=True)  # fmt: skip
        return
    key = jax.random.key(time.time_ns() % 2**31)
    make = jax.jit(partial(make_tree, size))
    gradient = make(key)
    exact = sum(leaf.size for leaf in jax.tree.leaves(gradient))
    adamw = optax.adamw(1e-4)
    chain = optax.chain(ogpsa_project(rank, scope=scope, basis_dtype=dtype), adamw)
    # Both own their parameters: they are donated.
    runs = {}
    for name, tx in (("adamw", adamw), ("chain", chain)):
        params = make(key)
        runs[name] = [tx, params, tx.init(params)]
    push = jax.jit(partial(push_reference, window=rank), donate_argnums=0)
    for i in range(rank):
        runs["chain"][2] = push(runs["chain"][2], make(jax.random.fold_in(key, i + 1)))
    programs = {name: compiled_step(*run, gradient) for name, run in runs.items()}
    times: dict[str, list[float]] = {"adamw": [], "chain": []}
    for i in range(rounds + 2):
        for name in ("adamw", "chain") if i % 2 else ("chain", "adamw"):
            tx, params, state = runs[name]
            seconds, params, state = timed(programs[name], params, state, gradient)
            runs[name] = [tx, params, state]
            if i >= 2:
                times[name].append(seconds)
    base = statistics.median(times["adamw"])
    rate = 7 * 4 * exact / base
    floor = exact * (4 + 2 * rank * width) / rate
    added = [b - a for a, b in zip(times["adamw"], times["chain"], strict=True)]
    ratios = sorted(x / floor for x in added)
    temporary = [programs[n].memory_analysis().temp_size_in_bytes / 2**20 for n in programs]
    print(
        f"{exact / 1e6:7.0f} M  {rank:4d}  {dtype:9s} {base * 1e3:8.1f}  {rate / 1e9:6.1f}  "
        f"{floor * 1e3:8.1f}  {statistics.median(added) * 1e3:8.1f}  "
        f"{statistics.median(ratios):5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
        f"{temporary[1] - temporary[0]:8.2f}",
        flush=True,
    )


def main() -> None:
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{device.device_kind} ({device.platform}), {platform.machine()}, {cores} core(s) used of "
        f"{os.cpu_count()}, load {load}; jax {jax.__version__}, optax {optax.__version__}"
    )
    print(
        "   size    rank  basis     AdamW ms   GB/s  floor ms  added ms  "
        "added/floor (min to max)  temporary MiB"
    )
    for size in (int(float(x)) for x in OPTIONS.sizes.split(",")):
        for rank in (int(x) for x in OPTIONS.ranks.split(",")):
            for dtype in OPTIONS.basis_dtypes.split(","):
                measure(size, rank, dtype, OPTIONS.scope, OPTIONS.rounds)


if __name__ == "__main__":
    OPTIONS = arguments()
    if OPTIONS.one_thread:  # before jax starts its threads
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import jax
    import jax.numpy as jnp
    import optax

    from ogpsa_jax import ogpsa_project, push_reference

    main()
