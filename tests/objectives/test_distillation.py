"""Divergence from a teacher's predictions, against NumPy in float64 over whole vocabularies."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ogpsa_jax.objectives import distillation
from ogpsa_jax.objectives.cross_entropy import shifted_loss_mask
from ogpsa_jax.objectives.distillation import distillation_loss, top_predictions

from .conftest import VOCABULARY, Batch, Toy, with_empty_rows

Drawer = Callable[..., Batch]


@pytest.fixture
def teacher(rng: np.random.Generator) -> Toy:
    return Toy(nnx.Rngs(int(rng.integers(2**31))))


def taught(teacher: Any, batch: Batch, k: int) -> Batch:
    """The batch with what the teacher predicts at every position."""
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}
    found = jax.jit(partial(top_predictions, teacher, k=k, chunk_size=5))(arrays)
    names = ("teacher_ids", "teacher_log_probs", "teacher_rest")
    return batch | {name: np.asarray(a) for name, a in zip(names, found, strict=True)}


def log_probs(model: Any, batch: Batch) -> np.ndarray:
    """float64 ``[B, T, V]`` from the float32 logits."""
    logits = model.unembed(
        model.hidden_states(batch["input_ids"], batch["positions"], batch["segment_ids"])
    )
    logits = np.asarray(logits, np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def merged_divergence(p: np.ndarray, q: np.ndarray, k: int) -> np.ndarray:
    """KL over p's k likeliest tokens and one event for all others, float64 ``[B, T]``."""
    order = np.argsort(-p, axis=-1, kind="stable")
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
    total = np.sum(np.exp(p[..., :k]) * (p[..., :k] - q[..., :k]), axis=-1)
    if k < p.shape[-1]:
        rests = [np.log(np.exp(x[..., k:]).sum(-1)) for x in (p, q)]
        total += np.exp(rests[0]) * (rests[0] - rests[1])
    return total


def value_and_gradient(model: nnx.Module, batch: Batch, chunk_size: int = 5) -> Any:
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(params: Any, batch: Any) -> Any:
        model = nnx.merge(graphdef, params)
        total, weight, _ = distillation_loss(model, batch, chunk_size=chunk_size)
        return total, weight

    (total, weight), gradient = loss(params, batch)
    return float(total), float(weight), jax.tree.leaves(gradient)


@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1, VOCABULARY])
@pytest.mark.parametrize("chunk_size", [1, 5, 512])
def test_the_loss_is_the_divergence_with_the_rest_as_one_event(
    k: int, chunk_size: int, toy: Toy, teacher: Toy, draw_rows: Drawer
) -> None:
    batch = taught(teacher, draw_rows(4, 13), k)
    mask = np.asarray(shifted_loss_mask(batch))
    p, q = log_probs(teacher, batch), log_probs(toy, batch)
    merged, full = merged_divergence(p, q, k), merged_divergence(p, q, VOCABULARY)
    total, weight, _ = value_and_gradient(toy, batch, chunk_size)
    assert weight == mask.sum() > 0
    # A sum of some hundred float32 terms below ten.
    np.testing.assert_allclose(total, merged[mask].sum(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_less(merged, full + 1e-9)
    assert k < VOCABULARY or np.allclose(merged, full, atol=1e-12)


def test_a_rest_below_float32_of_one_keeps_its_digits(teacher: Toy, draw_rows: Drawer) -> None:
    """Where 1 - sum of the kept probabilities would be 0, or noise, in float32."""
    sharp = Toy(nnx.Rngs(0))
    sharp.kernel = nnx.Param(teacher.kernel[...] * 40)
    sharp.embedding, sharp.mixing = teacher.embedding, teacher.mixing
    batch = taught(sharp, draw_rows(4, 13), 8)
    rest = batch["teacher_rest"]
    p = np.sort(log_probs(sharp, batch), axis=-1)[..., :-8]
    np.testing.assert_allclose(rest, np.log(np.exp(p).sum(-1)), rtol=1e-5, atol=1e-4)
    assert rest.min() < -20  # float32 knows nothing between 1 and 1 - e^-17


def test_the_gradient_is_that_of_the_definition(toy: Toy, teacher: Toy, draw_rows: Drawer) -> None:
    k, step = 4, 1e-3
    batch = taught(teacher, draw_rows(3, 9), k)
    mask = np.asarray(shifted_loss_mask(batch))
    *_, gradient = value_and_gradient(toy, batch)
    graphdef, params = nnx.split(toy, nnx.Param)
    leaves, treedef = jax.tree.flatten(params)
    direction = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]

    def at(size: float) -> float:
        moved = [x + size * d for x, d in zip(leaves, direction, strict=True)]
        q = log_probs(nnx.merge(graphdef, treedef.unflatten(moved)), batch)
        return float(merged_divergence(log_probs(teacher, batch), q, k)[mask].sum())

    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction, strict=True))
    # Central differences: step squared, and float32 logits over the step.
    expected = (at(step) - at(-step)) / (2 * step)
    assert slope == pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_a_model_beside_itself_has_no_loss_and_no_gradient(toy: Toy, draw_rows: Drawer) -> None:
    for k in (4, VOCABULARY):
        total, weight, gradient = value_and_gradient(toy, taught(toy, draw_rows(3, 9), k))
        assert (total, weight > 0) == (0.0, True)
        assert all(not np.any(leaf) for leaf in gradient)


def test_nothing_counts_but_what_the_loss_mask_says(
    toy: Toy, teacher: Toy, draw_rows: Drawer
) -> None:
    batch = taught(teacher, draw_rows(4, 13), 4)
    mask = np.asarray(shifted_loss_mask(batch))
    other = {name: array.copy() for name, array in batch.items()}
    other["teacher_ids"][~mask] = 0  # as batches hold them where there is no prediction
    other["teacher_log_probs"][~mask] = 0.0
    other["teacher_rest"][~mask] = 0.0
    results = [value_and_gradient(toy, b) for b in (batch, other, with_empty_rows(other, 3))]
    for total, weight, gradient in results:
        assert np.isfinite(total)
        assert all(np.isfinite(leaf).all() for leaf in gradient)
        assert weight == results[0][1]
        assert total == pytest.approx(results[0][0], rel=1e-6)
        for ours, first in zip(gradient, results[0][2], strict=True):
            np.testing.assert_allclose(ours, first, rtol=1e-5, atol=1e-6)


def test_any_cut_into_micro_batches_adds_up(toy: Toy, teacher: Toy, draw_rows: Drawer) -> None:
    batch = taught(teacher, draw_rows(6, 13), 4)
    total, weight, gradient = value_and_gradient(toy, batch)
    parts = [
        value_and_gradient(toy, {name: array[rows] for name, array in batch.items()})
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    assert sum(part[1] for part in parts) == weight
    assert sum(part[0] for part in parts) == pytest.approx(total, rel=1e-5)
    for i, leaf in enumerate(gradient):
        np.testing.assert_allclose(sum(part[2][i] for part in parts), leaf, rtol=1e-4, atol=1e-5)


def test_a_batch_without_predictions_is_refused(toy: Toy, draw_rows: Drawer) -> None:
    with pytest.raises(ValueError, match="teacher_ids is missing"):
        distillation_loss(toy, draw_rows(2, 9))


def test_maxima_one_by_one_are_those_of_top_k(rng: np.random.Generator) -> None:
    logits = rng.integers(-3, 4, (3, 5, 40)).astype(np.float32)  # with many ties
    expected = jax.lax.top_k(logits, 9)
    assert jax.device_count() > 1
    for ours, theirs in zip(distillation._largest(jnp.asarray(logits), 9), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_sharded_vocabulary_stays_sharded(rng: np.random.Generator, draw_rows: Drawer) -> None:
    """No device ever holds the logits of all tokens, and no exchange is of their size."""
    vocabulary, k, chunk, rows, size = 1024, 8, 16, 4, 8
    mesh = jax.make_mesh((2, 4), ("rows", "words"), axis_types=(AxisType.Auto,) * 2)

    def placed(array: Any, *axes: Any) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    model = Toy(nnx.Rngs(int(rng.integers(2**31))), size)
    model.embedding = nnx.Param(placed(rng.standard_normal((vocabulary, size), np.float32)))
    model.kernel = nnx.Param(
        placed(rng.standard_normal((size, vocabulary), np.float32), None, "words")
    )
    model.mixing = nnx.Param(placed(model.mixing[...]))
    graphdef, params = nnx.split(model, nnx.Param)
    batch = {n: placed(a, "rows") for n, a in draw_rows(rows, 32, vocabulary=vocabulary).items()}

    @jax.jit
    def predict(params: Any, batch: Any) -> Any:
        return top_predictions(nnx.merge(graphdef, params), batch, k, chunk)

    @jax.jit
    @partial(jax.grad)
    def gradient(params: Any, batch: Any) -> Any:
        return distillation_loss(nnx.merge(graphdef, params), batch, chunk_size=chunk)[0]

    found = predict(params, batch)
    names = ("teacher_ids", "teacher_log_probs", "teacher_rest")
    full = batch | dict(zip(names, found, strict=True))
    for program in (predict.lower(params, batch), gradient.lower(params, full)):
        text = program.compile().as_text()
        assert f"[{rows // 2},{chunk},{vocabulary // 4}]" in text
        for shape in (f"[{rows // 2},{chunk},{vocabulary}]", f"[{rows},{chunk},{vocabulary}]"):
            assert shape not in text, shape
