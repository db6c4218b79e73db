"""A step of the official method beside the same in torch, plain, with one set and with two.

    python scripts/bench_torch.py                                # minutes
    python scripts/bench_torch.py --small --rounds 1             # in seconds

Qwen2 of 50.2 M parameters in float32, two micro-batches of 4 rows of 128 tokens, clipping, AdamW,
one core. Torch runs transformers' model with the published rule in hooks on every parameter, in
every micro-batch; here the preset `paper` projects the step's gradient once. Needs torch and
transformers. Refreshes are not part of a step.
"""

import argparse
from collections.abc import Callable
from typing import Any

import bench_common as bench
import jax
import numpy as np
import torch
import transformers
from flax import nnx

from ogpsa_jax import refresh
from ogpsa_jax.models import Decoder
from ogpsa_jax.training.step import Network

SETS = (0, 1, 2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="2 layers of width 64")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def torch_steps(architecture: Any, ids: np.ndarray) -> dict[str, Callable[[], None]]:
    """By name: a step of transformers' model with so many sets."""
    torch.set_num_threads(1)
    config = transformers.Qwen2Config(
        vocab_size=architecture.vocab_size, hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size, tie_word_embeddings=True,
        num_hidden_layers=architecture.num_layers, num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batches = torch.from_numpy(ids)
    count = 0

    def hook(bases: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def project(gradient: torch.Tensor) -> torch.Tensor | None:
            if count == 0:
                return None
            if count == 1:
                [base, _] = bases
                return gradient - (gradient * base).sum() / ((base * base).sum() + 1e-8) * base
            first = bases[0] / (bases[0].norm() + 1e-8)
            rest = bases[1] - (bases[1] * first).sum() * first
            second = rest / (rest.norm() + 1e-8)
            along = (gradient * first).sum() * first + (gradient * second).sum() * second
            return gradient - along

        return project

    for parameter in model.parameters():
        bases = [torch.randn_like(parameter) for _ in range(2)]
        parameter.register_hook(hook([base / base.norm() for base in bases]))

    def step(sets: int) -> None:
        nonlocal count
        count = sets
        for batch in batches:
            loss = model(input_ids=batch, labels=batch).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {f"torch, {sets} sets": lambda sets=sets: step(sets) for sets in SETS}


def jax_steps(architecture: Any, ids: np.ndarray) -> dict[str, bench.Step]:
    """By name: a step of the trainer with so many sets."""
    network = Network.of(Decoder(architecture, rngs=nnx.Rngs(0)))
    batch = bench.random_batch(0, ids.shape, architecture.vocab_size)
    found = {}
    for sets in SETS:
        overrides = [f"ogpsa.preset={'paper' if sets else 'off'}", "train.micro_batch_size=4"]
        overrides += [f"ogpsa.rank={sets}"] if sets else []
        step = bench.Step(overrides, network, {**batch, "input_ids": jax.numpy.asarray(ids)})
        if sets:
            references = [
                jax.tree.map(lambda p, key=key: jax.random.normal(key, p.shape), step.state.params)
                for key in jax.random.split(jax.random.key(1), sets)
            ]
            opt_state = jax.jit(refresh)(step.state.opt_state, references)
            step.state = step.state._replace(opt_state=opt_state)
        found[f"here, {sets} sets"] = step
    return found


def main(options: argparse.Namespace) -> None:
    architecture = bench.qwen2(2, 64, 512) if options.small else bench.qwen2(12, 512)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, architecture.vocab_size, (2, 4, 128))
    steps = jax_steps(architecture, ids.astype(np.int32)) | torch_steps(architecture, ids)
    print(f"{bench.machine()}, torch {torch.__version__}")
    seconds = bench.take_turns(steps, options.rounds)
    print(f"\n{'step':16s} {'CPU seconds':24s} {'of torch':22s} added, % of the plain step")
    for name, found in seconds.items():
        sets = name.partition(", ")[2]
        plain = seconds[name.replace(sets, "0 sets")]
        added = [100 * (ratio - 1) for ratio in bench.ratios(found, plain)]
        beside = bench.spread(bench.ratios(found, seconds[f"torch, {sets}"]))
        print(f"{name:16s} {bench.spread(found):24s} {beside:22s} {bench.spread(added, 1)}")


if __name__ == "__main__":
    OPTIONS = arguments()
    bench.use_one_core()
    main(OPTIONS)
