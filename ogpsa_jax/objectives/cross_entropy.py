"""Cross-entropy and log-probabilities without the logits of a whole batch in memory.

Logits are computed, used and dropped for a few positions of every row at a time, forward and
backward: at a vocabulary of 152,000 they would otherwise be by far the largest tensor.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]


def shifted_loss_mask(batch: Batch) -> jax.Array:
    """Which positions predict a token in the loss mask.

    Args:
      batch: ``loss_mask`` bool and ``segment_ids`` int32, both ``[..., T]``.

    Returns:
      bool ``[..., T]``: true at t where token t + 1 is in the loss mask and belongs to the document
      of token t. The last position predicts nothing.
    """
    segments = batch["segment_ids"]
    mask = batch["loss_mask"][..., 1:] & (segments[..., 1:] == segments[..., :-1])
    mask = mask & (segments[..., 1:] > 0)
    return jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, 1)])


def over_chunks(
    model: Any,
    batch: Batch,
    chunk_size: int,
    function: Callable[..., Any],
    *arrays: jax.Array,
) -> Any:
    """Apply a function to the logits of a few positions of every row at a time.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: as for :func:`target_log_probs`; of `input_ids` alone, each row is one text.
      chunk_size: positions of each row whose logits exist at a time, forward and backward.
      function: ``(logits [B, C, V], *arrays [B, C, ...]) -> pytree of [B, C, ...]``.
      *arrays: ``[B, T, ...]``, cut as the logits are.

    Returns:
      What the function gives, its chunks put together: ``[B, T, ...]``.
    """
    dropout = {"dropout_keys": batch["dropout_keys"]} if "dropout_keys" in batch else {}
    hidden = model.hidden_states(
        batch["input_ids"],
        positions=batch.get("positions"),
        segment_ids=batch.get("segment_ids"),
        **dropout,
    )

    def of_rows(unembed: Callable[[jax.Array], jax.Array], *arrays: jax.Array) -> Any:
        length = arrays[0].shape[1]  # the whole row, or a part of it that lies on one device
        chunk = min(chunk_size, length)
        missing = -length % chunk

        def cut(x: jax.Array) -> jax.Array:
            padded = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
            split = padded.reshape(len(x), -1, chunk, *x.shape[2:])
            return jnp.moveaxis(split, 1, 0)

        def together(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

        @jax.checkpoint
        def of_chunk(hidden: jax.Array, *arrays: jax.Array) -> Any:
            return function(unembed(hidden), *arrays)

        def body(_: None, chunks: tuple[jax.Array, ...]) -> tuple[None, Any]:
            return None, of_chunk(*chunks)

        _, found = jax.lax.scan(body, None, tuple(cut(x) for x in arrays))
        return jax.tree.map(together, found)

    return model.with_logits(of_rows, hidden, *arrays)


def target_log_probs(model: Any, batch: Batch, chunk_size: int) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every token in the loss mask.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: ``input_ids``, ``loss_mask``, ``segment_ids``, ``positions``, each ``[B, T]``; perhaps
        ``dropout_keys``, PRNG keys ``[B]``, for models that drop something in training.
      chunk_size: positions of each row whose logits exist at a time.

    Returns:
      float32 ``[B, T]``, zero outside the loss mask, and the mask, bool ``[B, T]``.
    """
    return _of_every_target(model, batch, chunk_size, log_probs_of)


def log_probs_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 ``[B, C]``: of targets ``[B, C]`` by logits ``[B, C, V]``."""
    # Picking the target by comparison, not by index, leaves a sharded vocabulary sharded.
    vocabulary = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(vocabulary == targets[..., None], logits, 0.0), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1)


def _log_probs_and_entropies(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    every = jax.nn.log_softmax(logits, axis=-1)
    return log_probs_of(logits, targets), -jnp.sum(jnp.exp(every) * every, axis=-1)


def _of_every_target(
    model: Any,
    batch: Batch,
    chunk_size: int,
    measure: Callable[[jax.Array, jax.Array], Any],
) -> tuple[Any, jax.Array]:
    """`measure` of logits ``[B, C, V]`` and targets ``[B, C]``, for a few positions at a time.

    Its arrays ``[B, C]`` come back as ``[B, T]``, zero outside the loss mask, with the mask.
    """
    mask = shifted_loss_mask(batch)
    targets = jnp.pad(batch["input_ids"][:, 1:], [(0, 0), (0, 1)])
    found = over_chunks(model, batch, chunk_size, measure, targets)
    return jax.tree.map(lambda x: jnp.where(mask, x, 0.0), found), mask


def token_cross_entropy(
    model: Any, batch: Batch, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy summed over the tokens in the loss mask, and their number.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: arrays ``[B, T]``, or pairs ``[B, 2, T]``, whose rows all count; perhaps ``row_share``,
        see :func:`by_share`.
      chunk_size: positions of each row whose logits exist at a time.

    Returns:
      (nats, tokens), float32 scalars.
    """
    rows = _as_rows(batch)
    found, mask = target_log_probs(model, rows, chunk_size)
    return -jnp.sum(by_share(found, rows)), jnp.sum(mask, dtype=jnp.float32)


def by_share(losses: jax.Array, batch: Batch) -> jax.Array:
    """The losses of rows times what each row counts.

    Args:
      losses: ``[B, ...]``.
      batch: perhaps with ``row_share``, float32 ``[B]``: the rows then belong to the means of
        several batches, and a row's share is 1 over the weight of its own.

    Returns:
      Shape and dtype of `losses`; without ``row_share`` the losses as they are.
    """
    if "row_share" not in batch:
        return losses
    return losses * batch["row_share"].reshape(-1, *(1,) * (losses.ndim - 1))


def sequence_log_probs(
    model: Any, batch: Batch, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each row's tokens in the loss mask together, and their number.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: arrays ``[B, T]``, or pairs ``[B, 2, T]`` (chosen, rejected), run in one forward pass.
      chunk_size: positions of each row whose logits exist at a time.

    Returns:
      (nats, tokens), each float32 ``[B]`` or ``[B, 2]``.
    """
    shape = batch["input_ids"].shape[:-1]
    found, mask = target_log_probs(model, _as_rows(batch), chunk_size)
    counts = jnp.sum(mask, axis=-1, dtype=jnp.float32)
    return pairwise_sum(found).reshape(shape), counts.reshape(shape)


def surprise(
    model: Any, batch: Batch, *, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross-entropy and the model's own entropy, which its own answers would cost on average.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: arrays ``[B, T]``, or pairs ``[B, 2, T]``, whose rows all count.
      chunk_size: positions of each row whose logits exist at a time.

    Returns:
      (nats, tokens, the sum ``entropy`` in nats), float32 scalars.
    """
    (found, entropies), mask = _of_every_target(
        model, _as_rows(batch), chunk_size, _log_probs_and_entropies
    )
    weight = jnp.sum(mask, dtype=jnp.float32)
    return -jnp.sum(found), weight, {"entropy": jnp.sum(entropies)}


def pairwise_sum(values: jax.Array) -> jax.Array:
    """Sum over the last axis by halves: float32 ``[..., n]`` -> ``[...]``.

    Rewards are small differences of sums of a few hundred nats, where one float32 unit is 1.5e-5;
    a running sum over n tokens is off by some √n of them, halves by one or two.
    """
    size = values.shape[-1]
    padded = 1 << (size - 1).bit_length()
    values = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padded - size)])
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _as_rows(batch: Batch) -> Batch:
    keys = ("input_ids", "loss_mask", "segment_ids", "positions")
    rows = {key: batch[key].reshape(-1, batch[key].shape[-1]) for key in keys}
    if "dropout_keys" in batch:
        rows["dropout_keys"] = batch["dropout_keys"].reshape(-1)
    if "row_share" in batch:
        copies = len(rows["input_ids"]) // len(batch["input_ids"])
        rows["row_share"] = jnp.repeat(batch["row_share"], copies)
    return {**batch, **rows}
