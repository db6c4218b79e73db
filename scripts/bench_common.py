"""What the benchmarks share: calls that take turns, their spread, the machine, a step to time.

Calls are timed in turns, so that a machine that slows down slows all of them, and compared within a
turn. The first turn warms up and does not count. On CPUs the processor time of the process counts,
so that other processes cost nothing; on accelerators, which the process waits for, the clock does.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.config import load_config
from ogpsa_jax.models.config import DecoderConfig
from ogpsa_jax.objectives.dpo import dpo_loss
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.step import Network, TrainState, make_input_subspace, make_train_step


def use_one_core() -> None:
    """Pin the process to one core. JAX must not have begun."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def machine() -> str:
    """What a figure depends on, in one line."""
    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    cores = len(os.sched_getaffinity(0))
    device = jax.devices()[0]
    return (
        f"{processor()}, {cores} core(s) used of {os.cpu_count()}, load {load}; "
        f"{device.device_kind} ({device.platform}); jax {jax.__version__}"
    )


def processor() -> str:
    """The processor's name, if the system gives one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds of one call: of the processor on CPUs, by the clock on accelerators."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    began = clock()
    jax.block_until_ready(call())
    return clock() - began


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call by name, `rounds` each; every other turn goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in list(calls) if turn % 2 else reversed(calls):
            seconds = seconds_of(calls[name])
            if turn:
                found[name].append(seconds)
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, smallest and largest."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [value / one for value, one in zip(values, base, strict=True)]


def qwen2(layers: int, width: int, vocabulary: int = 32000) -> DecoderConfig:
    """A Qwen2 of the proportions of 50.2 M parameters, which are 12 layers of width 512."""
    return DecoderConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4,
        num_layers=layers, num_heads=max(width // 64, 1), num_kv_heads=max(width // 256, 1),
        head_dim=64, model_type="qwen2", qkv_bias=True, tie_word_embeddings=True,
    )  # fmt: skip


def configuration(overrides: Sequence[str]) -> Any:
    """The smoke configuration in float32, with nothing computed twice."""
    common = ["model.dtype=float32", "train.remat=none", "train.loss_chunk=128"]
    return load_config("configs/smoke-sft.yaml", [*common, *overrides])


def random_batch(
    seed: int, shape: tuple[int, ...], vocabulary: int, *, pairs: bool = False
) -> dict[str, Any]:
    """Full rows: [micro-batches, rows, length], of pairs [micro-batches, rows, 2, length]."""
    if pairs:
        shape = (*shape[:-1], 2, shape[-1])
    batch = {
        "input_ids": jax.random.randint(jax.random.key(seed), shape, 0, vocabulary),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape),
        "loss_mask": jnp.ones(shape, bool),
    }
    return {**batch, "reference_logps": jnp.zeros(shape[:-1])} if pairs else batch


class Step:
    """A compiled step and its state; calling it makes one step.

    Args:
      overrides: of :func:`configuration`.
      network: whose parameters it copies, for a step donates them.
      *batches: as :func:`random_batch` gives them: of training and, where every step has
        references, of these.
    """

    def __init__(self, overrides: Sequence[str], network: Network, *batches: Any) -> None:
        config = configuration(overrides)
        optimizer = make_optimizer(config, total_steps=10**6)
        params = jax.tree.map(jnp.copy, network.trained)
        self.state = TrainState(params, optimizer.init(params))
        sft = partial(sft_loss, chunk_size=config.train.loss_chunk)
        pairs = "reference_logps" in batches[0]
        loss = partial(dpo_loss, chunk_size=config.train.loss_chunk) if pairs else sft
        if config.ogpsa.subspace == "inputs" and len(batches) > 1:
            span = make_input_subspace(network.graphdef, size=config.ogpsa.rank + 64, lora=False)
            self.state = span(self.state, network.frozen, (batches[1],))
        step = make_train_step(
            network.graphdef, loss, optimizer, reference_loss=sft if len(batches) > 1 else None
        )
        self.rest = (network.frozen, *batches)
        self.step = step.lower(self.state, *self.rest).compile()

    def __call__(self) -> Any:
        """One step."""
        self.state, metrics = self.step(self.state, *self.rest)
        return metrics["loss"]
