"""Supervised fine-tuning: cross-entropy of the assistant's tokens."""

from typing import Any

import jax

from ogpsa_jax.objectives.cross_entropy import Batch, token_cross_entropy


def sft_loss(
    model: Any, batch: Batch, *, chunk_size: int = 512
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Token cross-entropy; the weight is the number of target tokens.

    Args:
      model: has ``hidden_states`` and ``unembed``.
      batch: arrays ``[B, T]``.
      chunk_size: positions of each row whose logits exist at a time.

    Returns:
      (loss sum in nats, target tokens, no further metrics).
    """
    total, weight = token_cross_entropy(model, batch, chunk_size)
    return total, weight, {}
