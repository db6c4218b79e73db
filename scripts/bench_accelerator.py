"""Model FLOPs utilization of a 1.5B model in bfloat16, and what the projection adds to its step.

    python scripts/bench_accelerator.py                       # on one GPU or TPU of 80 GB
    python scripts/bench_accelerator.py --small --rounds 1    # anywhere, in seconds

Shapes are those of Qwen2.5-1.5B; weights are random. The plain step and the step with the
projection take the same rows. Utilization is given where the device's peak is known (see
ogpsa_jax/accelerators.py), never on a CPU. `--torch` adds transformers' step on the same device.
"""

import argparse
from collections.abc import Callable
from typing import Any

import bench_common as bench
import jax
import numpy as np
from flax import nnx

from ogpsa_jax.accelerators import accelerator
from ogpsa_jax.models import Decoder
from ogpsa_jax.models.config import DecoderConfig
from ogpsa_jax.training.speed import model_flops
from ogpsa_jax.training.step import Network

QWEN_1_5B = DecoderConfig(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
    num_kv_heads=2, head_dim=128, model_type="qwen2", qkv_bias=True, tie_word_embeddings=True,
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="2 layers of width 64, 64 tokens")
    parser.add_argument("--rows", type=int, default=8, help="rows a micro-batch, references alike")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--torch", action="store_true", help="beside transformers")
    return parser.parse_args()


def torch_step(architecture: DecoderConfig, ids: np.ndarray) -> Callable[[], None]:
    """A step of transformers' model on the device that torch has."""
    import torch
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=architecture.vocab_size, hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size, tie_word_embeddings=True,
        num_hidden_layers=architecture.num_layers, num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads, use_cache=False,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.Qwen2ForCausalLM(config).to(device)
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batches = torch.from_numpy(ids.copy()).long().to(device)

    def step() -> None:
        for batch in batches:
            with torch.autocast(device, torch.bfloat16):
                loss = model(input_ids=batch, labels=batch).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main(options: argparse.Namespace) -> None:
    architecture, length = QWEN_1_5B, options.length
    if options.small:
        architecture, length = bench.qwen2(2, 64, 512), 64
    decoder = Decoder(architecture, rngs=nnx.Rngs(0), dtype="bfloat16", remat="full")
    network = Network.of(decoder)

    def batch(seed: int, micro_batches: int) -> dict[str, Any]:
        shape = (micro_batches, options.rows, length)
        return bench.random_batch(seed, shape, architecture.vocab_size)

    projected = ["ogpsa.preset=recommended", "ogpsa.energy=1.0", "references.target=answers"]
    projected += ["references.in_step={share: 0.5, replay_weight: 1.0}"]
    projected += [f"ogpsa.rank={8 if options.small else 512}"]
    calls: dict[str, Callable[[], Any]] = {
        "plain": bench.Step(["ogpsa.preset=off"], network, batch(0, 2)),
        "projected": bench.Step(projected, network, batch(0, 1), batch(1, 1)),
    }
    if options.torch:
        calls["torch"] = torch_step(architecture, np.asarray(batch(0, 2)["input_ids"]))
    print(bench.machine())
    seconds = bench.take_turns(calls, options.rounds)
    rows = 2 * options.rows
    tokens, attended = rows * length, rows * length * (length + 1) / 2
    flops = model_flops(architecture, tokens, attended, frozen=False)
    device = accelerator(jax.devices()[0].device_kind)
    for name, found in seconds.items():
        added = [100 * (ratio - 1) for ratio in bench.ratios(found, seconds["plain"])]
        line = f"{name}: {bench.spread(found, 4)} s, {bench.spread(added, 1)} % added"
        if device is not None:
            line += f", MFU {bench.spread([flops / x / device.flops for x in found])}"
        print(line)


if __name__ == "__main__":
    main(arguments())
