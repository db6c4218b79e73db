"""The initial model's own answers to the reference rows, and its predictions on them.

Computed once, before training, and cached on disk under a digest of everything they depend on
(weights, precision, every token and its mask, settings), so that no other model's are used.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.config import RunConfig
from ogpsa_jax.data import Example, Predictions, Tokens, digest, fixed_batches
from ogpsa_jax.models import generate
from ogpsa_jax.objectives.cross_entropy import shifted_loss_mask
from ogpsa_jax.objectives.distillation import top_predictions
from ogpsa_jax.progress import quick_bar
from ogpsa_jax.training.array_cache import Arrays, cache_folder, read_arrays, write_arrays
from ogpsa_jax.training.initial_model import InitialModel
from ogpsa_jax.training.mesh import row_shards, shard_rows
from ogpsa_jax.training.model_digests import model_key

TOP_KS = (8, 16, 32, 64, 128, 256)
LARGEST_REST = 0.01
_VERSION = 1  # of the computations: raise it when their results change
# The same on every mesh: what is drawn depends on the row's number in its batch.
_ANSWERED_AT_ONCE = 32


def answer_prompts(
    sets: Sequence[list[Example]],
    found: InitialModel,
    model: Callable[[], Any],
    config: RunConfig,
    stop_tokens: Sequence[int],
) -> tuple[list[list[Example]], dict[str, Any]]:
    """Prompts, each with the initial model's answer, of which every token is in the loss mask.

    Args:
      sets: prompts alone.
      found: which model answers.
      model: makes it; called only where something is not yet known.
      config: says how it answers.
      stop_tokens: what ends an answer.

    Returns:
      The sets with answers, and counts for the summary.
    """
    settings = config.references.own_answers
    drawn = config.seed if settings.temperature else None
    prompts = [example for examples in sets for example in examples]
    key = (
        model_key(found.section, found.seed, _VERSION, found.key)
        + json.dumps(
            ["answers", settings.model_dump(), config.data.max_length, list(stop_tokens), drawn]
        ).encode()
    )
    path = cache_folder("initial_answers") / f"{digest(prompts, key)}.npz"

    def right(arrays: Arrays) -> bool:
        lengths = arrays["lengths"]
        return lengths.shape == (len(prompts),) and arrays["ids"].shape == (lengths.sum(),)

    arrays = read_arrays(path, right)
    if arrays is None:
        answers = _answers(model(), prompts, config, stop_tokens)
        arrays = {
            "lengths": np.asarray([len(ids) for ids in answers], np.int32),
            "ids": np.concatenate([np.asarray(ids, np.int32) for ids in answers]),
        }
        write_arrays(path, arrays, "the initial model's answers")
    answered = iter(np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1]))
    done = [[_answered(example, next(answered)) for example in examples] for examples in sets]
    ends = [example.sequences[0].ids[-1] for examples in done for example in examples]
    return done, {
        "rows": len(ends),
        "tokens": int(arrays["lengths"].sum()),
        "unfinished": int(np.sum(~np.isin(ends, np.asarray(stop_tokens)))),
    }


def _answers(
    model: Any, prompts: Sequence[Example], config: RunConfig, stop_tokens: Sequence[int]
) -> list[list[int]]:
    settings = config.references.own_answers
    answers: list[list[int]] = []
    bar = quick_bar("the initial model's answers", len(prompts), "rows")
    shortest = min(example.length for example in prompts)
    most_new = min(settings.max_new_tokens, config.data.max_length - shortest)
    for first in range(0, len(prompts), _ANSWERED_AT_ONCE):
        rows = [
            example.sequences[0].ids.tolist() for example in prompts[first:][:_ANSWERED_AT_ONCE]
        ]
        room = [config.data.max_length - len(row) for row in rows]
        added = generate(
            model,
            rows,
            max_new_tokens=most_new,
            temperature=settings.temperature,
            seed=int(np.random.SeedSequence([config.seed, first]).generate_state(1)[0] >> 1),
            stop_tokens=stop_tokens,
        )
        answers += [ids[:most] for ids, most in zip(added, room, strict=True)]
        bar.at(len(answers))
    return answers


def _answered(example: Example, answer: np.ndarray) -> Example:
    prompt = example.sequences[0].ids
    ids = np.concatenate([prompt, answer]).astype(np.int32)
    return dataclasses.replace(
        example, sequences=(Tokens(ids, np.arange(len(ids)) >= len(prompt)),)
    )


def add_predictions(
    sets: Sequence[list[Example]],
    found: InitialModel,
    model: Callable[[], Any],
    config: RunConfig,
    mesh: Mesh,
    vocabulary: int,
) -> tuple[list[list[Example]], dict[str, Any]]:
    """Examples with what the initial model predicts of each token in the loss mask.

    Args:
      sets: single sequences.
      found: which model predicts.
      model: makes it; called only where something is not yet known.
      config: says how many tokens of a prediction are kept.
      mesh: the devices.
      vocabulary: its size, the most that can be kept.

    Returns:
      The sets, in order, and what is kept: ``top_k`` tokens of a prediction, and the mass that they
      leave to the rest on average.
    """
    examples = [example for examples in sets for example in examples]
    wanted = [len(_targets(example)) for example in examples]
    asked = config.references.top_k
    settings = json.dumps(["predictions", asked, [] if asked else [*TOP_KS, LARGEST_REST]])
    key = model_key(found.section, found.seed, _VERSION, found.key) + settings.encode()
    path = cache_folder("initial_predictions") / f"{digest(examples, key)}.npz"

    def right(arrays: Arrays) -> bool:
        rows, kept = arrays["ids"].shape
        shapes = (arrays["log_probs"].shape, arrays["rest"].shape)
        finite = all(np.isfinite(array).all() for array in arrays.values())
        return rows == sum(wanted) and shapes == ((rows, kept), (rows,)) and finite

    arrays = read_arrays(path, right)
    if arrays is None:
        predict = partial(_batches, examples, config, mesh)
        teacher = model()
        kept = min(asked or _chosen(teacher, predict, config, mesh, vocabulary), vocabulary)
        arrays = _predictions(teacher, predict, config, mesh, kept)
        write_arrays(path, arrays, "the initial model's predictions")
    cuts = np.cumsum(wanted)[:-1]
    parts = [np.split(arrays[name], cuts) for name in ("ids", "log_probs", "rest")]
    predictions = (Predictions(*part) for part in zip(*parts, strict=True))
    done = [
        [dataclasses.replace(example, teacher=next(predictions)) for example in examples]
        for examples in sets
    ]
    rest = float(np.mean(np.exp(arrays["rest"], dtype=np.float64)))
    return done, {"top_k": arrays["ids"].shape[1], "rest_mass": rest}


def _targets(example: Example) -> np.ndarray:
    """The positions that predict a token in the loss mask."""
    return np.flatnonzero(example.sequences[0].loss_mask[1:])


def _batches(examples: list[Example], config: RunConfig, mesh: Mesh, title: str) -> Any:
    """Yields batches on the devices, with the examples that are in them."""
    rows = config.train.micro_batch_size * row_shards(mesh)
    batches = fixed_batches(
        [dataclasses.replace(example, teacher=None) for example in examples],
        batch_size=rows,
        max_length=config.data.max_length,
        multiple=row_shards(mesh),
    )
    bar = quick_bar(title, len(examples), "rows")
    for i in range(len(batches["input_ids"])):
        placed = shard_rows({name: array[i : i + 1] for name, array in batches.items()}, mesh)
        yield {name: array[0] for name, array in placed.items()}, examples[i * rows :][:rows]
        bar.at(min((i + 1) * rows, len(examples)))


def _on_all_devices(mesh: Mesh, arrays: Any) -> Any:
    """Whole on every device, so that every process can read them."""
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return jax.lax.with_sharding_constraint(arrays, everywhere)  # type: ignore[no-untyped-call]


def _chosen(
    model: Any, predict: Callable[..., Any], config: RunConfig, mesh: Mesh, vocabulary: int
) -> int:
    """The smallest of `TOP_KS` that leaves at most `LARGEST_REST` to the rest, or the largest.

    To count the rest as one event loses, at a position with the rest p of the teacher's mass, p
    times the divergence of teacher and model within the rest: nothing at the start, and little
    where p is small.
    """
    graphdef, state = nnx.split(model)
    sizes = np.asarray([k for k in TOP_KS if k < vocabulary] or [vocabulary])
    largest = int(sizes[-1])

    @jax.jit
    def rests(state: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        found = top_predictions(nnx.merge(graphdef, state), batch, largest, config.train.loss_chunk)
        _, log_probs, rest = found
        probs = jnp.exp(log_probs)
        # Small ones first: what several of them leave is their sum.
        beyond = jnp.cumsum(probs[..., ::-1], axis=-1)[..., ::-1]
        beyond = jnp.concatenate([beyond[..., 1:], jnp.zeros_like(beyond[..., :1])], axis=-1)
        masses = beyond[..., sizes - 1] + jnp.exp(rest)[..., None]
        mask = shifted_loss_mask(batch)
        sums = jnp.sum(jnp.where(mask[..., None], masses, 0.0), axis=(0, 1)), jnp.sum(mask)
        done: tuple[jax.Array, jax.Array] = _on_all_devices(mesh, sums)
        return done

    total, count = np.zeros(len(sizes)), 0.0
    for batch, _ in predict("choosing references.top_k"):
        masses, positions = rests(state, batch)
        total, count = total + np.asarray(masses, np.float64), count + float(positions)
    enough = np.flatnonzero(total <= LARGEST_REST * count)
    return int(sizes[enough[0]] if len(enough) else largest)


def _predictions(
    model: Any,
    predict: Callable[..., Any],
    config: RunConfig,
    mesh: Mesh,
    kept: int,
) -> Arrays:
    """``ids`` and ``log_probs`` [targets of all examples, kept], ``rest`` [targets]."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def top(state: Any, batch: Any) -> Any:
        found = top_predictions(nnx.merge(graphdef, state), batch, kept, config.train.loss_chunk)
        return _on_all_devices(mesh, found)

    parts: list[list[np.ndarray]] = [[], [], []]
    for batch, rows in predict("the initial model's predictions"):
        found = [np.asarray(array) for array in top(state, batch)]
        for i, example in enumerate(rows):
            for part, array in zip(parts, found, strict=True):
                part.append(array[i, _targets(example)])
    ids, log_probs, rest = (np.concatenate(part) for part in parts)
    return {"ids": ids, "log_probs": log_probs, "rest": np.maximum(rest, -1e4)}
