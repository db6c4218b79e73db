"""Supervised fine-tuning: cross-entropy of the assistant's tokens."""

from typing import Any

import jax

from ogpsa_jax.objectives.cross_entropy import Batch, sequence_log_probs, token_cross_entropy


def sft_loss(
    model: Any, batch: Batch, *, chunk_size: int = 512, per_row: bool = False
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Token cross-entropy; the weight is the number of target tokens.

    Args:
      model: has ``hidden_states`` and ``with_logits``.
      batch: arrays ``[B, T]``.
      chunk_size: positions of each row whose logits exist at a time.
      per_row: also give each row's part.

    Returns:
      (loss sum in nats, target tokens, no further metrics, or with `per_row` float32 ``[B]``:
      ``row_loss`` and ``row_weight``).
    """
    if per_row:
        found, counts = sequence_log_probs(model, batch, chunk_size)
        loss, weight = (
            -found.reshape(len(found), -1).sum(-1),
            counts.reshape(len(found), -1).sum(-1),
        )
        return loss.sum(), weight.sum(), {"row_loss": loss, "row_weight": weight}
    total, weight = token_cross_entropy(model, batch, chunk_size)
    return total, weight, {}
