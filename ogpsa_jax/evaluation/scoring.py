"""Log-likelihoods of token sequences under a decoder; no [batch, length, vocab] is ever made."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ogpsa_jax.models import Decoder
from ogpsa_jax.models.generation import rows_multiple
from ogpsa_jax.objectives.cross_entropy import log_probs_of, over_chunks, pairwise_sum

# Tokens whose logits exist at a time, per row; lengths are rounded up to a multiple of it.
_CHUNK = 32


class LogLikelihood(NamedTuple):
    """Of a continuation.

    Attributes:
      total: sum of the log-probabilities, in nats.
      tokens: how many they are.
      greedy: whether each token was the likeliest one.
    """

    total: float
    tokens: int
    greedy: bool


def score_continuations(
    model: Decoder,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    done: Callable[[int], None] | None = None,
) -> list[LogLikelihood]:
    """Log-likelihoods of continuations given contexts.

    Args:
      model: sharded or not.
      pairs: token ids of a context (at least one token) and its continuation.
      batch_size: rows a forward pass.
      max_length: longest input; of longer ones the last tokens are kept, as lm-evaluation-harness
        does. By default the model's ``max_position_embeddings``.
      done: called after each batch with the number of pairs in it.

    Returns:
      One for each pair, in order.

    Raises:
      ValueError: an empty context, an id outside the vocabulary, or a continuation that is longer
        than `max_length`.
    """
    limit = model.config.max_position_embeddings if max_length is None else max_length
    for i, (context, continuation) in enumerate(pairs):
        if not context:
            raise ValueError(f"pairs[{i}] must have at least one token of context, got none")
        if len(continuation) > limit:
            raise ValueError(
                f"pairs[{i}] must have a continuation of at most {limit} tokens, got "
                f"{len(continuation)}"
            )
        worst = max((*context, *continuation))
        if worst >= model.config.vocab_size:
            raise ValueError(f"pairs[{i}] contains the id {worst}, outside the vocabulary")
    rows = [[*context, *continuation][-(limit + 1) :] for context, continuation in pairs]
    batch_size = min(batch_size, max(len(pairs), 1))
    batch_size = -(-batch_size // rows_multiple(model)) * rows_multiple(model)
    graphdef, state = nnx.split(model)
    results: list[LogLikelihood] = [LogLikelihood(0.0, 0, True)] * len(pairs)
    for batch in _batches([len(row) for row in rows], batch_size):
        length = _bucket(max(len(rows[i]) for i in batch) - 1)
        tokens = np.zeros((batch_size, length), np.int32)
        targets = np.zeros((batch_size, length), np.int32)
        counted = np.zeros((batch_size, length), bool)
        for at, i in enumerate(batch):
            row, count = rows[i], len(pairs[i][1])
            tokens[at, : len(row) - 1] = row[:-1]
            targets[at, : len(row) - 1] = row[1:]
            counted[at, len(row) - 1 - count : len(row) - 1] = True
        totals, greedy = jax.device_get(_score(graphdef, state, tokens, targets, counted))
        for at, i in enumerate(batch):
            results[i] = LogLikelihood(float(totals[at]), len(pairs[i][1]), bool(greedy[at]))
        if done is not None:
            done(len(batch))
    return results


def rolling_windows(
    tokens: Sequence[int], prefix: int, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Cut a text into (context, continuation) pairs that predict each token once.

    As lm-evaluation-harness does it: the first window follows a prefix token; later ones are
    full, so that the last one has as much context as fits.

    Args:
      tokens: of the text.
      prefix: id that stands before the first token, that of the beginning or end of a text.
      max_length: longest input.
    """
    pairs = [([prefix], list(tokens[:max_length]))] if tokens else []
    for start in range(max_length, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        pairs.append((list(tokens[end - max_length - 1 : start]), list(tokens[start:end])))
    return pairs


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, the longest first: memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _bucket(length: int) -> int:
    """Round up to one of few lengths, so that few programs are compiled."""
    step = _CHUNK
    while step * 8 < length:
        step *= 2
    return -(-max(length, 1) // step) * step


@functools.partial(jax.jit, static_argnames="graphdef")
def _score(
    graphdef: Any, state: nnx.State, tokens: jax.Array, targets: jax.Array, counted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sum of log-probabilities float32 [batch], and whether all were the largest, bool [batch]."""
    model: Decoder = nnx.merge(graphdef, state)

    def measure(logits: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
        return log_probs_of(logits, wanted), jnp.argmax(logits, axis=-1) == wanted

    # Rows are padded on the right, where a causal model's earlier positions do not see it.
    log_probs, likeliest = over_chunks(model, {"input_ids": tokens}, _CHUNK, measure, targets)
    total = pairwise_sum(jnp.where(counted, log_probs, 0.0))
    greedy = jnp.all(likeliest | ~counted, axis=1)
    mesh = model.placement.mesh
    if mesh is None:
        return total, greedy
    # Every process reads the result.
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return jax.lax.with_sharding_constraint(  # type: ignore[no-untyped-call]
        (total, greedy), everywhere
    )
