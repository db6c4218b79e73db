"""The rows of reference batches over all row shards: the same gradient, at the cost of the rows."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ogpsa_jax import reference_gradients
from ogpsa_jax.objectives.distillation import distillation_loss
from ogpsa_jax.objectives.dpo import dpo_loss
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.refreshing import row_shares, spread_rows, spread_shape
from ogpsa_jax.training.step import make_loss

from .conftest import VOCABULARY, Toy

KEPT = 4  # predictions of a teacher
OBJECTIVES = {
    "sft": partial(sft_loss, chunk_size=4),
    "official": partial(sft_loss, chunk_size=4),
    "dpo": partial(dpo_loss, chunk_size=4),
    "distillation": partial(distillation_loss, chunk_size=4),
}


def drawn_batches(rng: np.random.Generator, count: int, size: int, kind: str) -> dict[str, Any]:
    """[batches, rows, (2,) T]; the last row is empty, as what fills up a batch."""
    shape = (count, size, 2, 9) if kind in ("dpo", "official") else (count, size, 9)
    at = np.arange(9)
    attended = at < rng.integers(3, 10, shape[:-1])[..., None]
    attended[-1, -1] = False
    batches = {
        "input_ids": rng.integers(0, VOCABULARY, shape).astype(np.int32),
        "loss_mask": attended & (at >= 1),
        "segment_ids": attended.astype(np.int32),
        "positions": np.where(attended, at, 0).astype(np.int32),
    }
    if kind == "dpo":
        batches["reference_logps"] = rng.normal(-9, 3, shape[:-1]).astype(np.float32)
    if kind == "distillation":
        ids = rng.permuted(np.tile(np.arange(VOCABULARY), (*shape, 1)), axis=-1)[..., :KEPT]
        batches["teacher_ids"] = ids.astype(np.int32)
        batches["teacher_log_probs"] = np.full((*shape, KEPT), np.log(0.2), np.float32)
        batches["teacher_rest"] = np.full(shape, np.log(0.2), np.float32)
    return batches


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("shards, micro_batch_size", [(1, 3), (4, 2), (64, 2)])
def test_the_gradient_is_the_mean_of_the_batches_means(kind, shards, micro_batch_size, rng):
    graphdef, params = nnx.split(Toy(nnx.Rngs(int(rng.integers(2**31)))))
    loss = make_loss(graphdef, OBJECTIVES[kind])
    batches = drawn_batches(rng, 5, 3, kind)

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        total, (weight, _) = loss(params, {}, batch)
        return total / jnp.maximum(weight, 1.0)

    batches["row_share"] = row_shares(batches, pairs=kind == "dpo")
    spread = spread_rows(batches, shards, micro_batch_size)
    assert spread["input_ids"].shape[1] % shards == 0
    del batches["row_share"]
    [wanted] = reference_gradients(mean_loss, params, [batches])
    [found] = reference_gradients(
        lambda params, batch: loss(params, {}, batch)[0], params, [spread]
    )
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_a_batch_without_a_target_counts_in_the_mean_as_before(rng):
    batches = drawn_batches(rng, 2, 2, "sft")
    batches["loss_mask"][0] = False
    assert (row_shares(batches, pairs=False)[0] == 1).all()


@pytest.mark.parametrize("shards", [1, 3, 8, 64, 256, 1000])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 16])
def test_no_shard_computes_more_rows_than_its_share_and_one_a_micro_batch(shards, micro_batch_size):
    for rows in (1, 4, 200, 401):
        micro_batches, size = spread_shape(rows, shards, micro_batch_size)
        assert size % shards == 0
        assert size // shards <= micro_batch_size
        share = -(-rows // shards)
        assert share <= micro_batches * size // shards < share + micro_batches
