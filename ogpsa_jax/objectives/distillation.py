r"""Distillation: the KL divergence of a model from stored predictions of a teacher.

Of each prediction of the teacher the k likeliest tokens are kept, with their probabilities
:math:`p_i`, and the mass :math:`p_\circ` of all others together. The loss of a position is the
divergence between teacher and model as distributions over those k + 1 events,

.. math:: \sum_{i=1}^{k} p_i (\log p_i - \log q_i) + p_\circ (\log p_\circ - \log q_\circ),

which is at most the divergence over the whole vocabulary (merging events loses information), equal
to it where k is the vocabulary, and zero for a model that predicts what the teacher did
(knowledge distillation, arXiv 1503.02531, with learning without forgetting's teacher, 1606.09282:
the model as it was).
"""

from typing import Any

import jax
import jax.numpy as jnp

from ogpsa_jax.objectives.cross_entropy import Batch, by_share, over_chunks, shifted_loss_mask

# In place of the logits of tokens that are left out of a sum: far below any logit, and finite, so
# that the gradient is zero and not undefined where all of them are left out.
_LEFT_OUT = -1e30
# Log-probabilities equal up to round-off are equal. An unchanged model then has no gradient,
# and not one of round-off, which may have any direction and would span a basis all the same.
_ROUND_OFF = 2e-5


def distillation_loss(
    model: Any, batch: Batch, *, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Divergence from the teacher's predictions; the weight is the number of predicted tokens.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: arrays ``[B, T]`` and, for position t that predicts token t + 1, the teacher's
        ``teacher_ids`` int32 ``[B, T, k]`` (distinct), ``teacher_log_probs`` float32 ``[B, T, k]``
        and ``teacher_rest`` float32 ``[B, T]``, the logarithm of the other tokens' mass. They count
        where the loss mask says that token t + 1 does; perhaps ``row_share``.
      chunk_size: positions of each row whose logits exist at a time.

    Returns:
      (loss sum in nats, predicted tokens, no further metrics).

    Raises:
      ValueError: the batch contains no predictions of a teacher.
    """
    if "teacher_ids" not in batch:
        raise ValueError("batch: teacher_ids is missing, which the distillation loss needs")
    teacher = (batch["teacher_ids"], batch["teacher_log_probs"], batch["teacher_rest"])
    divergences = over_chunks(model, batch, chunk_size, _divergences, *teacher)
    mask = shifted_loss_mask(batch)
    weight = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(by_share(jnp.where(mask, divergences, 0.0), batch)), weight, {}


def top_predictions(
    model: Any, batch: Batch, k: int, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a teacher predicts at every position, as :func:`distillation_loss` takes it.

    Args:
      model: the teacher; has ``hidden_states`` and ``with_logits``.
      batch: arrays ``[B, T]``.
      k: tokens kept, the likeliest first; at most the vocabulary.
      chunk_size: positions of each row whose logits exist at a time.

    Returns:
      (ids int32 ``[B, T, k]``, log-probabilities float32 ``[B, T, k]``, logarithm of the rest's
      mass float32 ``[B, T]``, below -1e29 where there is no rest).
    """

    def predictions(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        values, ids = _largest(logits, k)
        total = jax.nn.logsumexp(logits, axis=-1)
        return ids, values - total[..., None], _log_rest(logits, ids) - total

    found: tuple[jax.Array, jax.Array, jax.Array] = over_chunks(
        model, batch, chunk_size, predictions
    )
    return found


def _divergences(
    logits: jax.Array, ids: jax.Array, log_probs: jax.Array, rest: jax.Array
) -> jax.Array:
    """float32 ``[B, C]`` of logits ``[B, C, V]`` and the teacher's predictions."""
    total = jax.nn.logsumexp(logits, axis=-1)
    # Row by row, so that the compiler sees that no index leaves its row, and a vocabulary that is
    # sharded stays where it is: what is exchanged is of the size of `ids`.
    picked = jax.vmap(jax.vmap(lambda row, at: row[at]))(logits, ids)
    ratios = log_probs - (picked - total[..., None])
    of_kept = jnp.exp(log_probs) * ratios
    of_rest = jnp.exp(rest) * (rest - (_log_rest(logits, ids) - total))
    changed = jnp.max(jnp.abs(jax.lax.stop_gradient(ratios)), axis=-1) > _ROUND_OFF
    return jnp.where(changed, jnp.sum(of_kept, axis=-1) + of_rest, 0.0)


def _log_rest(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Logarithm of the summed exponentials of all logits but those of `ids`.

    Not log(1 - sum of the others' probabilities), which has no digit left where the rest is small.
    """
    left = jax.vmap(jax.vmap(lambda row, at: row.at[at].set(_LEFT_OUT)))(logits, ids)
    return jax.nn.logsumexp(left, axis=-1)


def _largest(logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of the last axis and their indices, the first of equal ones first."""
    if jax.device_count() == 1:
        return jax.lax.top_k(logits, k)

    # Over several devices top_k would gather all logits; maxima are exchanged one by one.
    def take(left: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        at = jnp.argmax(left, axis=-1).astype(jnp.int32)
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, left.shape, left.ndim - 1)
        without = jnp.where(vocabulary == at[..., None], -jnp.inf, left)
        return without, (jnp.max(left, axis=-1), at)

    _, (values, ids) = jax.lax.scan(take, logits, None, length=k)
    return jnp.moveaxis(values, 0, -1), jnp.moveaxis(ids, 0, -1)
