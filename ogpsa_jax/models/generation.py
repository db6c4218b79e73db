"""Text generation with a key-value cache: a batched prefill, then one token at a time, compiled.

Prompts of different lengths are padded on the left, so that all rows put their next token into the
same slot of the cache; padding is never attended to and positions count from each prompt's first
token.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ogpsa_jax.models.decoder import Decoder
from ogpsa_jax.models.layers import Cache

# Prompt lengths and row counts are rounded up, so that few different programs are compiled.
_LENGTH_MULTIPLE = 32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; see :func:`generate`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
    *,
    max_new_tokens: int,
    attention_mask: np.ndarray | jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue prompts.

    A row's sampled tokens depend on its prompt, its row number and the seed, not on the other rows.

    Args:
      model: sharded or not; rows are spread over the batch axes of its mesh.
      prompts: token ids, a list of lists of any lengths or an integer array [batch, length].
      max_new_tokens: at most this many tokens are added.
      attention_mask: [batch, length], nonzero where an array of prompts contains a token and not
        padding, on whichever side.
      temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled from.
      top_k: sample only from the k likeliest tokens.
      top_p: sample only from the fewest tokens whose probabilities sum to at least this (nucleus
        sampling, arXiv 1904.09751).
      seed: of the sampling.
      stop_tokens: ids that end a row; by default the model's end-of-sequence tokens.

    Returns:
      For each prompt the ids that were added, up to and including a stop token.

    Raises:
      ValueError: an empty prompt, a token id outside the vocabulary, or an argument out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    sampling = Sampling(float(temperature), top_k, top_p)
    rows = _rows(prompts, attention_mask, model.config.vocab_size)
    if not rows:
        return []
    stops = model.config.eos_token_ids if stop_tokens is None else tuple(stop_tokens)
    tokens, valid = _pad_left(rows, rows_multiple(model))
    graphdef, state = nnx.split(model)
    added, counts = _generate(
        graphdef,
        state,
        tokens,
        valid,
        np.arange(len(tokens)) < len(rows),
        np.asarray(stops, np.int32),
        jax.random.key(seed),
        max_new_tokens=max_new_tokens,
        sampling=sampling,
    )
    added, counts = np.asarray(added), np.asarray(counts)
    return [added[i, : counts[i]].tolist() for i in range(len(rows))]


def _rows(
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
    attention_mask: np.ndarray | jax.Array | None,
    vocab_size: int,
) -> list[np.ndarray]:
    rows = [np.asarray(row, np.int32).reshape(-1) for row in prompts]
    if attention_mask is not None:
        mask = np.asarray(attention_mask) != 0
        if mask.shape != np.shape(prompts):
            raise ValueError(
                f"attention_mask must have the shape {np.shape(prompts)} of prompts, got "
                f"{mask.shape}"
            )
        rows = [row[keep] for row, keep in zip(rows, mask, strict=True)]
    for i, row in enumerate(rows):
        if not row.size:
            raise ValueError(f"prompts[{i}] must have at least one token, got none")
        if row.min() < 0 or row.max() >= vocab_size:
            raise ValueError(
                f"prompts[{i}] must contain ids in [0, {vocab_size}), got {row.min()}..{row.max()}"
            )
    return rows


def rows_multiple(model: Decoder) -> int:
    """The number of shards into which the mesh splits the rows of a batch."""
    mesh = model.placement.mesh
    return 1 if mesh is None else model.placement.rules.shards("batch", mesh)


def _pad_left(rows: list[np.ndarray], row_multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validity [batch, length]; surplus rows repeat the last prompt."""
    length = -(-max(row.size for row in rows) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    rows = rows + [rows[-1]] * (-len(rows) % row_multiple)
    tokens = np.zeros((len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, length - row.size :] = row
        valid[i, length - row.size :] = True
    return tokens, valid


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "sampling"))
def _generate(
    graphdef: Any,
    state: nnx.State,
    tokens: jax.Array,
    valid: jax.Array,
    wanted: jax.Array,
    stops: jax.Array,
    key: jax.Array,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Added tokens [batch, max_new_tokens] and how many of them count [batch]."""
    model: Decoder = nnx.merge(graphdef, state)
    config, placement = model.config, model.placement
    batch, length = tokens.shape
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))

    shape = (
        config.num_layers,
        batch,
        length + max_new_tokens,
        config.num_kv_heads,
        config.head_dim,
    )
    axes = ("layers", "batch", None, "kv_heads", "head_dim")
    keys = placement.constrain(jnp.zeros(shape, placement.dtype), *axes)
    values = placement.constrain(jnp.zeros(shape, placement.dtype), *axes)

    slots = jnp.concatenate([valid, jnp.ones((batch, max_new_tokens), bool)], axis=1)
    lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0)
    segment_ids = valid.astype(jnp.int32)
    logits, keys, values = _next_logits(
        model, tokens, positions, (keys, values), 0, segment_ids=segment_ids
    )
    token = _choose(logits, row_keys, 0, sampling)
    added = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token)
    start = _Progress(
        step=jnp.int32(1),
        token=token,
        added=added,
        counts=jnp.ones((batch,), jnp.int32),
        done=_is_stop(token, stops) | ~wanted,
        keys=keys,
        values=values,
    )

    def unfinished(at: _Progress) -> jax.Array:
        return (at.step < max_new_tokens) & ~jnp.all(at.done)

    def decode(at: _Progress) -> _Progress:
        slot = length + at.step - 1
        visible = slots & (jnp.arange(slots.shape[1])[None] <= slot)
        logits, keys, values = _next_logits(
            model,
            at.token[:, None],
            (lengths + at.step - 1)[:, None],
            (at.keys, at.values),
            slot,
            visible=visible,
        )
        token = _choose(logits, row_keys, at.step, sampling)
        return _Progress(
            step=at.step + 1,
            token=token,
            added=jax.lax.dynamic_update_index_in_dim(at.added, token, at.step, axis=1),
            counts=at.counts + ~at.done,
            done=at.done | _is_stop(token, stops),
            keys=keys,
            values=values,
        )

    end = jax.lax.while_loop(unfinished, decode, start)
    if placement.mesh is None:
        return end.added, end.counts
    # Every process reads the result.
    everywhere = NamedSharding(placement.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return jax.lax.with_sharding_constraint(  # type: ignore[no-untyped-call]
        (end.added, end.counts), everywhere
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Progress:
    """State of the decoding loop.

    Attributes:
      step: int32 [], tokens added so far to rows that go on.
      token: int32 [batch], the last one added.
      added: int32 [batch, max_new_tokens].
      counts: int32 [batch], how many of ``added`` count.
      done: bool [batch].
      keys: of the cache, [layers, batch, slots, kv_heads, head_dim].
      values: like ``keys``.
    """

    step: jax.Array
    token: jax.Array
    added: jax.Array
    counts: jax.Array
    done: jax.Array
    keys: jax.Array
    values: jax.Array


def _next_logits(
    model: Decoder,
    tokens: jax.Array,
    positions: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    slot: jax.Array | int,
    *,
    segment_ids: jax.Array | None = None,
    visible: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Append tokens to the cache from a slot; logits [batch, vocab] after the last, new cache."""
    graphdef, stacked = nnx.split(model.layers)

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array], layer: tuple[nnx.State, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        x, keys, values = carry
        weights, index = layer
        written = Cache(keys, values, index, jnp.asarray(slot, jnp.int32), visible)
        x = nnx.merge(graphdef, weights)(x, rope, segment_ids, written)
        return (x, written.keys, written.values), None

    with model.matmul_precision():
        rope = model.rope(tokens, positions)
        layers = jnp.arange(model.config.num_layers, dtype=jnp.int32)
        carry = (model.embed(tokens), *cache)
        (x, keys, values), _ = jax.lax.scan(step, carry, (stacked, layers))
        return model.unembed(model.norm(x[:, -1])), keys, values


def _is_stop(token: jax.Array, stops: jax.Array) -> jax.Array:
    return jnp.any(token[:, None] == stops[None, :], axis=1)


def _choose(
    logits: jax.Array, row_keys: jax.Array, step: jax.Array | int, sampling: Sampling
) -> jax.Array:
    """The next token of each row, int32 [batch]; filters in the order transformers applies them."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # A token is kept while those before it do not reach top_p; the first always is.
        ranks = jnp.argsort(order, axis=-1)
        kept = jnp.take_along_axis(before < sampling.top_p, ranks, axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, step))(row_keys)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
