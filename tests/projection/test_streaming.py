"""References one at a time: against the batch result, and within the stated bound."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogpsa_jax import diagnostics, ogpsa_project, push_reference, refresh

from .helpers import assert_close, fuses_on_cpu, random_tree, vectors


def pushed(params, references, rank, window=None, scope="tensor"):
    tx = ogpsa_project(rank, scope=scope)
    push = jax.jit(partial(push_reference, window=window))
    state = tx.init(params)
    for reference in references:
        state = push(state, reference)
    return tx, state


def test_equals_the_batch_where_the_references_fit_the_rank(rng):
    params, gradient, a, b, c = (random_tree(rng) for _ in range(5))
    references = [a, b, c, a, b, jax.tree.map(lambda x, y: x - y, a, c)]
    tx, state = pushed(params, references, 3)
    batch = jax.jit(refresh)(state, [a, b, c])
    update = jax.jit(tx.update)
    assert_close(update(gradient, state)[0], update(gradient, batch)[0], 1e-5)
    assert np.all(np.asarray(state.discarded) < 1e-5)


@pytest.mark.parametrize("window", [None, 8])
def test_what_truncation_loses_stays_within_the_stated_bound(rng, window):
    rank, count = 2, 12
    params = random_tree(rng)
    references = [random_tree(rng) for _ in range(count)]
    _, state = pushed(params, references, rank, window)
    decay = 1.0 if window is None else 1 - 1 / window
    for i, stated in enumerate(np.asarray(state.discarded)):
        basis = np.stack([vectors(tree)[i] for tree in state.basis])
        lost = total = best = 0.0
        weighted = []
        for age, tree in enumerate(reversed(references)):
            unit = vectors(tree)[i] / np.linalg.norm(vectors(tree)[i])
            weight = decay**age
            total += weight
            lost += weight * (1.0 - np.sum((basis @ unit) ** 2))
            weighted.append(np.sqrt(weight) * unit)
        best = np.sum(np.linalg.svd(np.stack(weighted), compute_uv=False)[rank:] ** 2)
        # No basis of this rank can lose less than the best; ours, no more than it says.
        assert best - 1e-4 <= lost <= stated + 1e-4
        coverage = diagnostics(state)["groups"][state.settings.groups[i].label]
        assert float(coverage["reference_coverage"]) <= 1 - lost / total + 1e-5


def test_a_window_within_the_rank_holds_the_last_references_exactly(rng):
    params, gradient, *references = (random_tree(rng) for _ in range(6))
    tx, state = pushed(params, references, 3, window=2)
    batch = jax.jit(refresh)(state, references[-2:])
    update = jax.jit(tx.update)
    assert_close(update(gradient, state)[0], update(gradient, batch)[0], 5e-6)
    assert np.all(np.asarray(state.rank_used) == 2)


@pytest.mark.parametrize("window", [None, 2])
def test_restart_forgets_and_a_reference_that_is_not_finite_is_refused(rng, window):
    params, old, new = (random_tree(rng) for _ in range(3))
    tx = ogpsa_project(3)
    push = jax.jit(partial(push_reference, window=window))
    state = push(push(tx.init(params), old), new, restart=jnp.bool_(True))
    fresh = push(tx.init(params), new)
    assert_close(state.basis, fresh.basis, 1e-6)
    assert np.all(np.asarray(state.rank_used) == 1)
    bad = dict(new, b=jnp.full(9, jnp.nan))
    refused = push(state, bad)
    jax.tree.map(np.testing.assert_array_equal, refused.basis, state.basis)
    assert int(refused.refused_refreshes) == 1


def test_a_zero_reference_adds_no_direction(rng):
    params, reference = random_tree(rng), random_tree(rng)
    zero = jax.tree.map(jnp.zeros_like, params)
    for window in (None, 2):
        _, state = pushed(params, [reference, zero], 3, window)
        assert np.all(np.asarray(state.rank_used) == 1)


@fuses_on_cpu
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_a_push_holds_no_more_than_rank_plus_one_copies(rank):
    params = {f"w{i}": jax.ShapeDtypeStruct((4096, 4096), jnp.float32) for i in range(12)}
    size = sum(4 * leaf.size for leaf in params.values())
    state = jax.eval_shape(ogpsa_project(rank).init, params)
    push = jax.jit(push_reference, donate_argnums=0)
    memory = push.lower(state, params).compile().memory_analysis()
    # Beside the state, which is updated in place, and the reference that comes in; and the
    # vectors of one leaf: before, between and after the two combinations.
    assert memory.temp_size_in_bytes <= (rank + 1) * size + 3 * rank * size / len(params)


def test_a_window_below_one_is_refused(rng):
    params = random_tree(rng)
    with pytest.raises(ValueError, match="window must be at least 1, or None, got 0"):
        push_reference(ogpsa_project(1).init(params), params, window=0)
