"""Log-probabilities of the reference model: computed once per data set and cached.

So no second model stays in memory. The file's name is a digest of everything they depend on
(weights, precision, and every token with its mask, the result of tokenizer, template and data), so
no cached value is stale.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.origin import about
from ogpsa_jax.data import Example, digest, fixed_batches
from ogpsa_jax.models import load_pretrained
from ogpsa_jax.objectives.cross_entropy import sequence_log_probs
from ogpsa_jax.objectives.dpo import REFERENCE_FREE
from ogpsa_jax.progress import quick_bar
from ogpsa_jax.training.array_cache import Arrays, cache_folder, read_arrays, write_arrays
from ogpsa_jax.training.mesh import row_shards, shard_rows
from ogpsa_jax.training.model_digests import model_key

_VERSION = 1  # of the computation: raise it when its numbers change


def add_reference_log_probs(
    sets: Sequence[list[Example]],
    config: RunConfig,
    mesh: Mesh,
    initial: Callable[[], Any],
    folder: Path | None = None,
) -> list[list[Example]]:
    """Data sets of pairs with ``reference_logps``; others as they are.

    Args:
      sets: examples; pairs are those with two sequences.
      config: says which model is the reference.
      mesh: the devices.
      initial: makes the model that the stage starts from; called only where it is the reference and
        something is not yet known.
      folder: of the files; by default that of :mod:`~ogpsa_jax.training.array_cache`.

    Returns:
      The sets, in order.

    Raises:
      InputError: the reference model cannot be loaded.
    """
    folder = cache_folder("reference_log_probs") if folder is None else folder
    done = list(sets)
    if config.dpo.loss in REFERENCE_FREE:
        return done
    pairs = [i for i, examples in enumerate(sets) if examples and len(examples[0].sequences) == 2]
    if not pairs:
        return done
    model_key = _model_key(config)
    model = None
    for i in pairs:
        path = folder / f"{digest(sets[i], model_key)}.npz"
        found = _read(path, len(sets[i]))
        if found is None:
            if model is None:
                model = (
                    initial() if config.dpo.reference_model == "initial" else _other(config, mesh)
                )
            found = _compute(model, sets[i], config, mesh)
            write_arrays(path, {"log_probs": found}, "reference log-probabilities")
        done[i] = [
            replace(example, reference_logps=(float(chosen), float(rejected)))
            for example, (chosen, rejected) in zip(sets[i], found, strict=True)
        ]
    return done


def _other(config: RunConfig, mesh: Mesh) -> Any:
    with about("dpo.reference_model"):
        return load_pretrained(
            config.dpo.reference_model,
            dtype=config.model.dtype,
            param_dtype=config.model.param_dtype,
            mesh=mesh,
            attention=config.model.attention,
            unrounded=True,
        )


def _compute(model: Any, examples: list[Example], config: RunConfig, mesh: Mesh) -> np.ndarray:
    """float32 ``[pairs, 2]``."""
    graphdef, state = nnx.split(model)
    rows = config.train.micro_batch_size * row_shards(mesh)
    batches = fixed_batches(
        examples, batch_size=rows, max_length=config.data.max_length, multiple=row_shards(mesh)
    )
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]

    @jax.jit
    def log_probs(state: Any, batch: Any) -> jax.Array:
        found, _ = sequence_log_probs(nnx.merge(graphdef, state), batch, config.train.loss_chunk)
        return jax.lax.with_sharding_constraint(found, everywhere)  # type: ignore[no-untyped-call]

    count = len(batches["input_ids"])
    parts = []
    bar = quick_bar("reference log-probabilities", len(examples), "pairs")
    for i in range(count):
        placed = shard_rows({name: array[i : i + 1] for name, array in batches.items()}, mesh)
        batch = {name: array[0] for name, array in placed.items()}
        parts.append(np.asarray(log_probs(state, batch)))
        bar.at(min((i + 1) * rows, len(examples)))
    return np.concatenate(parts)[: len(examples)].astype(np.float32)


def _model_key(config: RunConfig) -> bytes:
    """Of the reference model: its files, or what its random weights are drawn from."""
    section = config.model
    if config.dpo.reference_model == "initial":
        return model_key(section, config.seed, _VERSION, "model.path")
    update = {"path": config.dpo.reference_model, "initial_weights": "pretrained", "lora": None}
    named = section.model_copy(update=update)
    return model_key(named, config.seed, _VERSION, "dpo.reference_model")


def _read(path: Path, pairs: int) -> np.ndarray | None:
    def right(arrays: Arrays) -> bool:
        found = arrays["log_probs"]
        return found.shape == (pairs, 2) and bool(np.isfinite(found).all())

    arrays = read_arrays(path, right)
    return None if arrays is None else arrays["log_probs"]
