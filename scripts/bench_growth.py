"""How a step grows with depth, width, length and devices, and what a DPO step costs beside SFT.

    python scripts/bench_growth.py                       # minutes
    python scripts/bench_growth.py --small --rounds 1    # in seconds

Every variant changes one thing of a common step: 4 layers of width 256, 4 rows of 128 tokens,
float32, no projection. On a CPU the devices are virtual: they share its cores, so that what grows
with them is only the work of splitting, and no network is measured.
"""

import argparse
import os
from typing import Any

import bench_common as bench
import jax
from flax import nnx
from jax.sharding import Mesh

from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.models import Decoder
from ogpsa_jax.training.mesh import make_mesh, shard_rows
from ogpsa_jax.training.step import Network

COMMON = {"layers": 4, "width": 256, "length": 128, "devices": 1, "pairs": False}
VOCABULARY, ROWS = 8192, 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a width of 64, one variant of each")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def variants(small: bool) -> dict[str, dict[str, Any]]:
    changes = [{}, {"layers": 8}, {"length": 256}, {"devices": 2}, {"pairs": True}]
    if not small:
        changes += [{"layers": 16}, {"width": 512}, {"length": 512}, {"devices": 4}]
    common = {**COMMON, "width": 64} if small else COMMON
    return {
        " ".join(f"{k}={v}" for k, v in change.items()) or "common": {**common, **change}
        for change in changes
    }


def make_step(layers: int, width: int, length: int, devices: int, pairs: bool) -> bench.Step:
    mesh: Mesh = make_mesh(MeshSection(fsdp=devices), jax.devices()[:devices])
    decoder = Decoder(bench.qwen2(layers, width, VOCABULARY), rngs=nnx.Rngs(0), mesh=mesh)
    shape = (1, ROWS // 2 if pairs else ROWS, length)
    batch = jax.device_get(bench.random_batch(0, shape, VOCABULARY, pairs=pairs))
    return bench.Step(["ogpsa.preset=off"], Network.of(decoder), shard_rows(batch, mesh))


def main(options: argparse.Namespace) -> None:
    steps = {name: make_step(**sizes) for name, sizes in variants(options.small).items()}
    print(bench.machine())
    seconds = bench.take_turns(steps, options.rounds)
    print(f"\n{'changed':16s} {'seconds (min to max)':26s} of the common step")
    for name, found in seconds.items():
        beside = bench.spread(bench.ratios(found, seconds["common"]))
        print(f"{name:16s} {bench.spread(found, 3):26s} {beside}")


if __name__ == "__main__":
    OPTIONS = arguments()
    flags = os.environ.get("XLA_FLAGS", "")
    if "device_count" not in flags:  # JAX has not begun
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"
    main(OPTIONS)
