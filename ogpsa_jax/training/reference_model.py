"""Log-probabilities of the reference model: computed once per data set, before training, and kept.

So no second model stays in memory. They are filed by everything they depend on (weights, precision,
and every token with its mask, which is all that tokenizer, template and data come to), so a file
that is found is never stale.
"""

import contextlib
import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.countdown import Countdown
from ogpsa_jax.data import Example, digest, fixed_batches
from ogpsa_jax.models import load_pretrained
from ogpsa_jax.models.folders import resolve_folder, weights_files
from ogpsa_jax.objectives.cross_entropy import sequence_log_probs
from ogpsa_jax.objectives.dpo import REFERENCE_FREE
from ogpsa_jax.training.config import RunConfig
from ogpsa_jax.training.mesh import row_shards, shard_rows
from ogpsa_jax.training.origin import about

logger = logging.getLogger(__name__)
_VERSION = 1  # of the computation: raise it when the numbers would come out otherwise


def cache_folder() -> Path:
    """Where reference log-probabilities are kept: ``$XDG_CACHE_HOME/ogpsa_jax``."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "ogpsa_jax" / "reference_log_probs"


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
      folder: of the files; by default :func:`cache_folder`.

    Returns:
      The sets, in order.

    Raises:
      InputError: the reference model cannot be loaded.
    """
    folder = cache_folder() if folder is None else folder
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
            if jax.process_index() == 0:
                _write(path, found)
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
    countdown = Countdown("reference log-probabilities", len(examples), "pairs")
    for i in range(count):
        placed = shard_rows({name: array[i : i + 1] for name, array in batches.items()}, mesh)
        batch = {name: array[0] for name, array in placed.items()}
        parts.append(np.asarray(log_probs(state, batch)))
        countdown.at(min((i + 1) * rows, len(examples)))
    return np.concatenate(parts)[: len(examples)].astype(np.float32)


def _model_key(config: RunConfig) -> bytes:
    """A digest of the reference model: its files, or what its random weights are drawn from."""
    found = hashlib.blake2b(f"{_VERSION} {config.model.dtype} {config.model.param_dtype}".encode())
    initial = config.dpo.reference_model == "initial"
    with about("model.path" if initial else "dpo.reference_model"):
        folder = resolve_folder(str(config.model.path) if initial else config.dpo.reference_model)
    files = [folder / "config.json"]
    if initial and config.model.initial_weights == "random":
        found.update(f"random {config.seed}".encode())
    else:
        files += weights_files(folder)
    if initial and config.model.lora is not None and config.model.lora.adapter is not None:
        with about("model.lora.adapter"):
            files += sorted(resolve_folder(config.model.lora.adapter).glob("adapter_*"))
    for path in files:
        found.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.digest()


def _read(path: Path, pairs: int) -> np.ndarray | None:
    """What a file holds; None where it, or any other process's, is not there or not whole."""
    found = None
    with contextlib.suppress(
        OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile
    ):
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)["log_probs"]
        if array.shape == (pairs, 2) and np.isfinite(array).all():
            found = array
    if jax.process_count() > 1:
        # All compute, or none does: computing takes every process.
        all_have = np.asarray(multihost_utils.process_allgather(np.asarray(found is not None)))
        if not all_have.all():
            return None
    return found


def _write(path: Path, log_probs: np.ndarray) -> None:
    """Complete or invisible; where nothing can be written, the run goes on without."""
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez(file, log_probs=log_probs)
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        logger.warning("%s: reference log-probabilities are not kept (%s)", path.parent, error)
