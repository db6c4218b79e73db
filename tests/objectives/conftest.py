"""A small model that the objectives can use, and random batches."""

import secrets
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

VOCABULARY = 23
Batch = dict[str, np.ndarray]


class Toy(nnx.Module):
    """Predicts from a token and the one before it in the same document."""

    def __init__(self, rngs: nnx.Rngs, size: int = 8) -> None:
        def drawn(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.normal(rngs.params(), shape) * 0.7)

        self.embedding, self.mixing = drawn(VOCABULARY, size), drawn(size, size)
        self.kernel = drawn(size, VOCABULARY)

    def hidden_states(
        self, input_ids: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        embedded = self.embedding[...][input_ids]
        before = jnp.pad(embedded, [(0, 0), (1, 0), (0, 0)])[:, :-1]
        mixed = embedded + jnp.where((positions > 0)[..., None], before, 0.0)
        return jnp.tanh(mixed @ self.mixing[...]) * (segment_ids > 0)[..., None]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.kernel[...]

    def with_logits(self, compute: Callable[..., Any], *rows: jax.Array) -> Any:
        return compute(self.unembed, *rows)


@pytest.fixture
def rng() -> np.random.Generator:
    """Freshly seeded; pytest shows the seed when a test fails."""
    seed = secrets.randbits(32)
    print(f"seed: {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def toy(rng: np.random.Generator) -> Toy:
    return Toy(nnx.Rngs(int(rng.integers(2**31))))


@pytest.fixture
def draw_rows(rng: np.random.Generator) -> Callable[..., Batch]:
    """Rows, or pairs of rows with reference log-probabilities: prompt, answer, padding."""

    def draw(
        count: int, length: int, *, pairs: bool = False, vocabulary: int = VOCABULARY
    ) -> Batch:
        shape = (count, 2) if pairs else (count,)
        at = np.arange(length)
        sizes = rng.integers(3, length + 1, shape)[..., None]
        prompts = rng.integers(1, sizes - 1)
        attended = at < sizes
        batch = {
            "input_ids": rng.integers(0, vocabulary, (*shape, length)).astype(np.int32),
            "loss_mask": (at >= prompts) & attended,
            "segment_ids": attended.astype(np.int32),
            "positions": np.where(attended, at, 0).astype(np.int32),
        }
        if pairs:
            answers = batch["loss_mask"].sum(-1)
            batch["reference_logps"] = (-answers * rng.uniform(2, 5, shape)).astype(np.float32)
        return batch

    return draw


def with_empty_rows(batch: Batch, count: int) -> Batch:
    """The batch filled up with rows that hold nothing."""
    return {
        name: np.concatenate([array, np.zeros((count, *array.shape[1:]), array.dtype)])
        for name, array in batch.items()
    }
