"""Prefill and decoding, as `ogpsa-jax evaluate` does them: tokens a second.

    python scripts/bench_generation.py                        # a minute
    python scripts/bench_generation.py --width 64 --rounds 1  # in seconds

Prompts of random ids are continued by one token, and by several, in turns. The first is the
prefill; the difference within a turn, shared among the further tokens, is what decoding costs.
"""

import argparse
import statistics

import bench_common as bench
import jax
from flax import nnx

from ogpsa_jax.models import Decoder, generate

VOCABULARY = 8192


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256, help="of a model of 12 layers")
    parser.add_argument("--rows", default="1,16", help="prompts at a time, comma-separated")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    model = Decoder(bench.qwen2(12, options.width, VOCABULARY), rngs=nnx.Rngs(0))
    print(bench.machine())
    print(f"\n{'rows':>4s}  {'prefill, tokens/s':28s} {'decode, tokens/s':28s} decode, ms a token")
    for rows in (int(text) for text in options.rows.split(",")):
        ids = jax.random.randint(jax.random.key(0), (rows, options.prompt), 0, VOCABULARY)
        prompts = ids.tolist()

        def continue_by(count: int, prompts: list[list[int]] = prompts) -> None:
            added = generate(model, prompts, max_new_tokens=count, stop_tokens=())
            assert all(len(row) == count for row in added)

        seconds = bench.take_turns(
            {"one": lambda: continue_by(1), "all": lambda: continue_by(options.new)},
            options.rounds,
        )
        prefill = [rows * options.prompt / x for x in seconds["one"]]
        each = [
            (b - a) / (options.new - 1) for a, b in zip(seconds["one"], seconds["all"], strict=True)
        ]
        decode = [rows / x for x in each]
        print(
            f"{rows:4d}  {bench.spread(prefill, 0):28s} {bench.spread(decode, 0):28s} "
            f"{1e3 * statistics.median(each):.1f}"
        )


if __name__ == "__main__":
    main(arguments())
