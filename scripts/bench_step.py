"""What the projection adds to a whole training step of a decoder with 50.2 M parameters.

    python scripts/bench_step.py --one-thread                              # minutes
    python scripts/bench_step.py --model configs/models/tiny --rounds 1    # in seconds

The trainer's step over two micro-batches of 4 rows of 128 tokens, in float32. The
plain step takes 8 rows. The others take as many: 4 rows, and 4 reference rows, whose gradient is
replayed. So every step has the same rows go through the same passes, and what is added is what the
projection and the replay do with the gradients. The steps take turns; processor time is counted.
"""

import argparse
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

ROWS, LENGTH = 4, 128
# As many rows, columns and layers as give 50.2 M parameters, embeddings tied.
SIZES = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_layers": 12,
    "num_heads": 8, "num_kv_heads": 2, "head_dim": 64,
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder with a config.json, in place of the 50.2 M")
    parser.add_argument("--ranks", default="64,146", help="of the inputs' basis")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--one-thread", action="store_true", help="pin the process to one core")
    return parser.parse_args()


def methods(ranks: list[int]) -> dict[str, list[str]]:
    """By name: overrides of the plain step's configuration."""
    found = {"plain": ["ogpsa.preset=off"]}
    replay = "references.in_step={{share: 0.5, window: {}, replay_weight: {}}}".format
    for rank in ranks:
        inputs = ["ogpsa.preset=recommended", f"ogpsa.rank={rank}", "ogpsa.energy=1.0"]
        inputs.append(replay("null", 8.0))
        found[f"inputs, rank {rank}, both"] = inputs
        found[f"inputs, rank {rank}, column_adamw"] = [
            *inputs, "ogpsa.placement=gradient", "optimizer.name=column_adamw"
        ]  # fmt: skip
    found["gradients, rank 1, window 1"] = ["ogpsa.preset=in-step", replay(1, 1.0)]
    return found


def configuration(overrides: list[str]) -> Any:
    common = [
        "model.dtype=float32", f"train.batch_size={2 * ROWS}", f"train.micro_batch_size={ROWS}",
        "train.remat=none", f"train.loss_chunk={LENGTH}",
    ]  # fmt: skip
    return load_config("configs/smoke-sft.yaml", [*common, *overrides])


def random_batch(seed: int, micro_batches: int, vocabulary: int) -> dict[str, Any]:
    shape = (micro_batches, ROWS, LENGTH)
    return {
        "input_ids": jax.random.randint(jax.random.key(seed), shape, 0, vocabulary),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), shape),
        "loss_mask": jnp.ones(shape, bool),
    }


class Run:
    """A compiled step, its state, and the processor time of each of its calls."""

    def __init__(self, overrides: list[str], network: Any, vocabulary: int) -> None:
        config = configuration(overrides)
        optimizer = make_optimizer(config, total_steps=10**6)
        params = jax.tree.map(jnp.copy, network.trained)  # it is donated
        state = TrainState(params, optimizer.init(params))
        in_step = bool(config.reference_rows)
        first = random_batch(1, 1 if in_step else 2, vocabulary)
        batches = [first, random_batch(2, 1, vocabulary)] if in_step else [first]
        if config.ogpsa.subspace == "inputs" and in_step:
            span = make_input_subspace(network.graphdef, size=config.ogpsa.rank + 64, lora=False)
            state = span(state, network.frozen, (batches[1],))
        loss = partial(sft_loss, chunk_size=config.train.loss_chunk)
        step = make_train_step(
            network.graphdef, loss, optimizer, reference_loss=loss if in_step else None
        )
        self.step = step.lower(state, network.frozen, *batches).compile()
        self.state, self.rest = state, (network.frozen, *batches)
        self.seconds: list[float] = []

    def turn(self) -> None:
        """One step."""
        start = time.process_time()
        self.state, metrics = jax.block_until_ready(self.step(self.state, *self.rest))
        self.seconds.append(time.process_time() - start)
        assert jnp.isfinite(metrics["loss"])


def main() -> None:
    architecture = DecoderConfig(
        **SIZES, model_type="qwen2", qkv_bias=True, tie_word_embeddings=True
    )
    if OPTIONS.model:
        architecture = read_config(Path(OPTIONS.model))
    network = Network.of(Decoder(architecture, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(network.trained))
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(
        f"{count / 1e6:.1f} M parameters, 2 x {ROWS} x {LENGTH} tokens, float32; "
        f"{len(os.sched_getaffinity(0))} core(s) used of {os.cpu_count()}, {processor()}, "
        f"load {load}; jax {jax.__version__}"
    )
    ranks = [int(rank) for rank in OPTIONS.ranks.split(",")]
    runs = {
        name: Run(overrides, network, architecture.vocab_size)
        for name, overrides in methods(ranks).items()
    }
    names = list(runs)
    for i in range(OPTIONS.rounds + 1):
        for name in names if i % 2 else reversed(names):
            runs[name].turn()
    print(f"\n{'step':32s} {'seconds':>8s}  {'added':>8s}  added, % of the plain step (min to max)")
    plain = runs["plain"].seconds[1:]  # the first call of each warms up
    for name, run in runs.items():
        added = [100 * (b - a) / a for a, b in zip(plain, run.seconds[1:], strict=True)]
        seconds = statistics.median(run.seconds[1:])
        print(
            f"{name:32s} {seconds:8.3f}  {seconds - statistics.median(plain):8.3f}  "
            f"{statistics.median(added):6.1f} ({min(added):.1f} to {max(added):.1f})"
        )


def processor() -> str:
    """The processor's name, if the system gives one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    OPTIONS = arguments()
    if OPTIONS.one_thread:  # before jax starts its threads
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ogpsa_jax.config import load_config
    from ogpsa_jax.models import Decoder
    from ogpsa_jax.models.config import DecoderConfig, read_config
    from ogpsa_jax.objectives.sft import sft_loss
    from ogpsa_jax.training.optimizer import make_optimizer
    from ogpsa_jax.training.step import Network, TrainState, make_input_subspace, make_train_step

    main()
