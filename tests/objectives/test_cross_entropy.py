"""Log-probabilities in chunks are those of whole rows, and whole rows of logits never exist."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ogpsa_jax.config import RunConfig
from ogpsa_jax.models import Decoder
from ogpsa_jax.models.config import read_config
from ogpsa_jax.objectives.cross_entropy import (
    pairwise_sum,
    sequence_log_probs,
    shifted_loss_mask,
    surprise,
    target_log_probs,
    token_cross_entropy,
)
from ogpsa_jax.objectives.dpo import dpo_loss
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.step import Network, TrainState, make_train_step

from .conftest import Batch, Toy

Drawer = Callable[..., Batch]
TINY = Path(__file__).resolve().parents[2] / "configs" / "models" / "tiny"


def whole_rows(model: Any, batch: Batch) -> jax.Array:
    """Log-probabilities of the tokens in the loss mask from all logits at once."""
    logits = model.unembed(
        model.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
    )
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probs, batch["input_ids"][:, 1:, None], axis=-1)[..., 0]
    return jnp.where(batch["loss_mask"][:, 1:], picked, 0.0)


@pytest.mark.parametrize("chunk", [1, 5, 12, 512])
def test_chunks_of_any_size_give_the_same_values_and_gradients(
    chunk: int, toy: Toy, draw_rows: Drawer
) -> None:
    batch = draw_rows(3, 13)
    graphdef, params = nnx.split(toy, nnx.Param)

    @partial(jax.jit, static_argnums=0)
    @partial(jax.value_and_grad, argnums=1, has_aux=True)
    def log_probs(chunked: bool, params: Any) -> Any:
        model = nnx.merge(graphdef, params)
        if not chunked:
            found = whole_rows(model, batch)
            return -jnp.sum(found), (jnp.pad(found, [(0, 0), (0, 1)]), jnp.sum(batch["loss_mask"]))
        total, tokens = token_cross_entropy(model, batch, chunk)
        return total, (target_log_probs(model, batch, chunk)[0], tokens)

    # A few roundings of float32 values below ten.
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        jax.tree.leaves(log_probs(True, params)),
        jax.tree.leaves(log_probs(False, params)),
    )


@pytest.mark.parametrize("chunk", [3, 512])
def test_surprise_is_cross_entropy_beside_the_models_own_entropy(
    chunk: int, toy: Toy, draw_rows: Drawer
) -> None:
    batch = draw_rows(3, 13)
    total, weight, sums = jax.jit(partial(surprise, toy, chunk_size=chunk))(batch)
    logits = toy.unembed(
        toy.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
    )
    p = np.asarray(jax.nn.softmax(logits[:, :-1]), np.float64)
    entropy = -(p * np.log(p)).sum(-1)[np.asarray(shifted_loss_mask(batch))[:, :-1]].sum()
    # Sums of some tens of float32 values.
    assert float(sums["entropy"]) == pytest.approx(entropy, rel=1e-5)
    nats, tokens = token_cross_entropy(toy, batch)
    assert float(total) == pytest.approx(float(nats), rel=1e-6)
    assert float(weight) == float(tokens)


@pytest.mark.parametrize("pairs", [False, True])
def test_rows_add_up_to_the_whole(pairs: bool, toy: Toy, draw_rows: Drawer) -> None:
    batch = draw_rows(5, 11, pairs=pairs)
    losses = [partial(sft_loss, toy)]
    if pairs:
        batch = {**batch, "reference_logps": jnp.full((5, 2), -7.0)}
        losses.append(partial(dpo_loss, toy, beta=0.3))
    for loss in losses:
        total, weight, _ = jax.jit(loss)(batch)
        _, _, rows = jax.jit(partial(loss, per_row=True))(batch)
        assert rows["row_loss"].shape == rows["row_weight"].shape == (5,)
        # Another order of some tens of float32 values.
        assert float(rows["row_loss"].sum()) == pytest.approx(float(total), rel=1e-5)
        assert float(rows["row_weight"].sum()) == float(weight)
        first = {name: array[:1] for name, array in batch.items()}
        alone, count, _ = loss(first)
        assert float(rows["row_loss"][0]) == pytest.approx(float(alone), rel=1e-5)
        assert float(rows["row_weight"][0]) == float(count)


def test_chosen_and_rejected_in_one_pass_equal_two_passes(toy: Toy, draw_rows: Drawer) -> None:
    batch = draw_rows(5, 11, pairs=True)
    log_probs = jax.jit(partial(sequence_log_probs, toy, chunk_size=4))
    both, counts = log_probs(batch)
    for side in (0, 1):
        rows = {name: array[:, side] for name, array in batch.items()}
        alone, count = log_probs(rows)
        np.testing.assert_allclose(both[:, side], alone, rtol=1e-6)
        np.testing.assert_array_equal(counts[:, side], count)


def test_no_document_is_predicted_from_another(rng: np.random.Generator) -> None:
    segments = np.sort(rng.integers(0, 4, (4, 20)), axis=1)[:, ::-1].copy()
    mask_in = rng.random((4, 20)) < 0.8
    mask = np.asarray(shifted_loss_mask({"loss_mask": mask_in, "segment_ids": segments}))
    for row, t in np.ndindex(mask.shape):
        inside = t + 1 < 20 and segments[row, t] == segments[row, t + 1] > 0
        assert mask[row, t] == (inside and mask_in[row, t + 1])


def test_sums_by_halves_are_right_to_a_few_units(rng: np.random.Generator) -> None:
    for size in (1, 2, 3, 17, 1000):
        values = (-rng.exponential(3.0, (5, size))).astype(np.float32)
        exact = values.astype(np.float64).sum(-1)
        error = np.abs(np.asarray(pairwise_sum(jnp.asarray(values))) - exact)
        # Ten levels of halves, each rounding its partial sums once.
        assert np.all(error <= 10 * np.spacing(np.abs(exact).astype(np.float32)))


def test_compiled_step_never_holds_the_logits_of_a_batch(draw_rows: Drawer) -> None:
    rows, length, vocabulary, chunk = 4, 64, 4096, 8
    # So many words that no other tensor is as large as the logits of two chunks.
    config = replace(read_config(TINY), vocab_size=vocabulary, num_layers=1)
    model = Decoder(config, rngs=nnx.Rngs(0), remat="none")
    network = Network.of(model)
    optimizer = make_optimizer(
        RunConfig.model_validate(
            {"objective": "dpo", "ogpsa": {"preset": "off"}, "optimizer": {"learning_rate": 1e-6}}
        ),
        10,
    )
    step = make_train_step(network.graphdef, partial(dpo_loss, chunk_size=chunk), optimizer)
    batch = draw_rows(rows, length, pairs=True, vocabulary=vocabulary)
    batch = {name: array[None] for name, array in batch.items()}
    state = TrainState(network.trained, optimizer.init(network.trained))
    text = step.lower(state, {}, batch).compile().as_text()
    shapes = {
        tuple(map(int, found.split(",")))
        for found in re.findall(r"(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    }
    of_words = [shape for shape in shapes if vocabulary in shape]
    chunk_of_logits = 2 * rows * chunk * vocabulary
    weights = config.hidden_size * vocabulary
    print("largest:", sorted(of_words, key=prod)[-3:])
    assert any(prod(shape) == chunk_of_logits for shape in of_words)
    assert max(prod(shape) for shape in of_words) <= max(chunk_of_logits, weights)
