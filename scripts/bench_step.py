"""What the projection adds to a whole training step of a decoder with 50.2 M parameters.

    python scripts/bench_step.py --one-thread                              # minutes
    python scripts/bench_step.py --model configs/models/tiny --rounds 1    # in seconds

The trainer's step over two micro-batches of 4 rows of 128 tokens, in float32. The
plain step takes 8 rows. The others take as many: 4 rows, and 4 reference rows, whose gradient is
replayed. So every step has the same rows go through the same passes, and what is added is what the
projection and the replay do with the gradients. The steps take turns; processor time is counted.
"""

import argparse
from pathlib import Path

import bench_common as bench
import jax
from flax import nnx

from ogpsa_jax.models import Decoder
from ogpsa_jax.models.config import read_config
from ogpsa_jax.training.step import Network

ROWS, LENGTH = 4, 128


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


def main(options: argparse.Namespace) -> None:
    architecture = read_config(Path(options.model)) if options.model else bench.qwen2(12, 512)
    network = Network.of(Decoder(architecture, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(network.trained))
    print(f"{count / 1e6:.1f} M parameters, 2 x {ROWS} x {LENGTH} tokens, float32")
    print(bench.machine())

    def batch(seed: int, micro_batches: int) -> dict[str, jax.Array]:
        return bench.random_batch(seed, (micro_batches, ROWS, LENGTH), architecture.vocab_size)

    ranks = [int(rank) for rank in options.ranks.split(",")]
    steps = {}
    for name, overrides in methods(ranks).items():
        batches = [batch(1, 2)] if name == "plain" else [batch(1, 1), batch(2, 1)]
        sizes = [f"train.batch_size={2 * ROWS}", f"train.micro_batch_size={ROWS}"]
        steps[name] = bench.Step([*sizes, *overrides], network, *batches)
    seconds = bench.take_turns(steps, options.rounds)
    print(f"\n{'step':32s} {'seconds (min to max)':24s} added, % of the plain step (min to max)")
    for name, found in seconds.items():
        added = [100 * (ratio - 1) for ratio in bench.ratios(found, seconds["plain"])]
        print(f"{name:32s} {bench.spread(found, 3):24s} {bench.spread(added, 1)}")


if __name__ == "__main__":
    OPTIONS = arguments()
    if OPTIONS.one_thread:
        bench.use_one_core()
    main(OPTIONS)
