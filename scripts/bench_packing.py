"""Useful tokens a second of packed rows beside padded rows, on examples of real lengths.

    python scripts/bench_packing.py --data ../shared/data/safety_tuned_llamas/safety_only_data_Instructions.json \
        --tokenizer ../shared/data/tokenizers/qwen2.5
    python scripts/bench_packing.py --rounds 1 --width 64        # data of this repository, in seconds

The examples are read, rendered and tokenised as in a run, then their ids are reduced to a vocabulary
of 2,048, for lengths alone matter here. Steps of both kinds take the same number of rows of the
same model and take turns. Padded rows are as long as the longest example of the run.
"""  # noqa: E501

import argparse
import statistics
import tempfile
from pathlib import Path

import bench_common as bench
import jax
import numpy as np
from flax import nnx

from ogpsa_jax.data import TrainBatches
from ogpsa_jax.models import Decoder
from ogpsa_jax.models.config import read_config
from ogpsa_jax.training.prepare import prepare_data
from ogpsa_jax.training.step import Network

VOCABULARY, ROWS = 2048, 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="configs/data/safety_sft.jsonl")
    parser.add_argument("--tokenizer", default="configs/models/tiny", help="and its config.json")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--width", type=int, default=256, help="of a model of 4 layers")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = bench.configuration([
            f"model.path={options.tokenizer}", f"data.train=[{{path: {options.data}}}]",
            "data.eval={}", "ogpsa.preset=off", f"data.max_length={options.max_length}",
            f"output_dir={folder}",
        ])  # fmt: skip
        examples = prepare_data(config, read_config(Path(options.tokenizer))).train
    lengths = [example.length for example in examples]
    network = Network.of(Decoder(bench.qwen2(4, options.width, VOCABULARY), rngs=nnx.Rngs(0)))
    steps, useful = {}, {}
    for name, packing in (("padded", False), ("packed", True)):
        batches = TrainBatches(
            examples, batch_size=ROWS, micro_batch_size=ROWS, packing=packing, seed=0,
            max_length=options.max_length,
        )  # fmt: skip
        whole = range(len(batches) - 1)  # the last may lack rows
        real = [float(np.sum(batches.batch(i)["segment_ids"] > 0)) for i in whole or [0]]
        batch = jax.tree.map(jax.numpy.asarray, batches.batch(0))
        batch["input_ids"] %= VOCABULARY
        steps[name] = bench.Step(["ogpsa.preset=off"], network, batch)
        useful[name] = statistics.mean(real)
        print(f"{name}: rows of {batches.length}, {useful[name] / ROWS / batches.length:.0%} used")
    print(f"{len(examples)} examples of {bench.spread(lengths, 0)} tokens\n{bench.machine()}")
    seconds = bench.take_turns(steps, options.rounds)
    rates = {name: [useful[name] / x for x in found] for name, found in seconds.items()}
    for name, rate in rates.items():
        print(f"{name}: {bench.spread(rate, 0)} useful tokens a second")
    print(f"packed / padded: {bench.spread(bench.ratios(rates['packed'], rates['padded']))}")


if __name__ == "__main__":
    main(arguments())
