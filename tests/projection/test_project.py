"""What the projection does to gradients, where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogpsa_jax import (
    diagnostics,
    first_order_change,
    ogpsa,
    ogpsa_project,
    reference_gradients,
    refresh,
)
from ogpsa_jax.projection.diagnostics import captured_fraction, mean_cosine

from .helpers import assert_close, project, random_tree, vectors


def test_is_the_identity_before_the_first_refresh(rng):
    gradient = random_tree(rng)
    tx = ogpsa_project(2)
    out, _ = tx.update(gradient, tx.init(gradient), gradient)
    jax.tree.map(np.testing.assert_array_equal, out, gradient)


def test_non_finite_references_leave_the_basis_in_place_and_are_counted(rng):
    gradient, good = random_tree(rng), random_tree(rng)
    tx = optax.chain(ogpsa_project(1), optax.sgd(1.0))
    again = jax.jit(lambda state, tree: refresh(state, [tree]))
    state = again(tx.init(gradient), good)
    for value in (np.nan, np.inf, -np.inf):
        bad = dict(good, b=good["b"].at[int(rng.integers(9))].set(value))
        state, before = again(state, bad), state
        jax.tree.map(np.testing.assert_array_equal, state[0].basis, before[0].basis)
    assert diagnostics(state)["refused_refreshes"] == 3
    assert diagnostics(state)["refreshes"] == 1


def test_a_step_projected_after_the_optimizer_leaves_reference_losses_to_first_order(rng, relaxed):
    params = random_tree(rng)
    references = [random_tree(rng) for _ in range(2)]
    tx = optax.chain(relaxed(optax.adamw(1e-2, weight_decay=0.1)), ogpsa_project(2))
    state = jax.jit(refresh)(tx.init(params), references)
    updates, _ = jax.jit(tx.update)(random_tree(rng), state, params)
    np.testing.assert_allclose(first_order_change(references, updates), 0.0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_first_order_change_is_the_cosine_at_any_scale(rng, scale):
    references, updates = [random_tree(rng) for _ in range(3)], random_tree(rng)
    u = vectors(updates, "global")[0]
    rows = [vectors(tree, "global")[0] for tree in references]
    desired = [row @ u / np.linalg.norm(row) / np.linalg.norm(u) for row in rows]
    scaled = jax.tree.map(lambda x: x * jnp.asarray(scale, x.dtype), references)
    np.testing.assert_allclose(first_order_change(scaled, updates), desired, atol=1e-6)
    scaled = jax.tree.map(lambda x: x * jnp.asarray(1 / scale, x.dtype), updates)
    np.testing.assert_allclose(first_order_change(references, scaled), desired, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_captured_fraction_is_that_of_new_references_in_the_old_basis(rng, scale):
    old, new = ([random_tree(rng) for _ in range(2)] for _ in range(2))
    state = ogpsa_project(2, scope="global").init(old[0])
    assert captured_fraction(state, new) == 0.0  # no basis yet
    state = refresh(state, old)
    rows_2xN, new_2xN = (
        np.stack([vectors(tree, "global", None)[0] for tree in trees]) for trees in (old, new)
    )
    q_Nx2 = np.linalg.qr(rows_2xN.T)[0]
    desired = np.mean(np.sum((new_2xN @ q_Nx2) ** 2, axis=1) / np.sum(new_2xN**2, axis=1))
    scaled = [new[0], jax.tree.map(lambda x: x * scale, new[1])]  # each counts the same
    np.testing.assert_allclose(captured_fraction(state, scaled), desired, rtol=1e-5)
    np.testing.assert_allclose(captured_fraction(state, old), 1.0, rtol=1e-5)


def test_the_mean_cosine_is_that_of_all_pairs(rng):
    trees = [random_tree(rng) for _ in range(3)]
    units_3xN = np.stack([vectors(tree, "global", None)[0] for tree in trees])
    units_3xN /= np.linalg.norm(units_3xN, axis=1, keepdims=True)
    cosines = units_3xN @ units_3xN.T
    desired = (cosines[0, 1] + cosines[0, 2] + cosines[1, 2]) / 3
    np.testing.assert_allclose(mean_cosine(trees), desired, atol=1e-6)


def test_first_order_change_of_nothing_is_zero_and_of_no_number_is_none(rng):
    tree = random_tree(rng)
    zero = jax.tree.map(jnp.zeros_like, tree)
    bad = dict(tree, b=tree["b"].at[0].set(np.inf))
    assert [*first_order_change([zero, tree], zero)] == [0.0, 0.0]
    assert np.isnan(first_order_change([bad, tree], tree)[0])
    assert np.isnan(first_order_change([tree], bad)[0])


def test_a_list_that_was_forgotten_is_told(rng):
    tree = random_tree(rng)
    state = ogpsa_project(1).init(tree)
    for call in (
        lambda: refresh(state, tree),
        lambda: first_order_change(tree, tree),
        lambda: reference_gradients(lambda params, batch: 0.0, tree, tree),
    ):
        with pytest.raises(ValueError, match=r"expected a list with .* got one dict; put it into"):
            call()


def test_refresh_projects_first_moments(rng, relaxed):
    params, reference = random_tree(rng), random_tree(rng)
    tx = optax.chain(ogpsa_project(1, scope="global"), relaxed(optax.adam(1e-2)))
    _, state = jax.jit(tx.update)(random_tree(rng), tx.init(params), params)
    state = jax.jit(lambda s, r: refresh(s, [r], project_momentum=True))(state, reference)
    assert abs(float(first_order_change([reference], state[1][0].mu)[0])) < 1e-6


def test_wrapping_an_optimizer_equals_chaining_and_both_shares_one_basis(rng, relaxed):
    params, gradient, reference = (random_tree(rng) for _ in range(3))

    def step(tx):
        def run(params, gradient, reference):
            state = refresh(tx.init(params), [reference], project_momentum=True)
            return tx.update(gradient, state, params)

        return jax.jit(run)(params, gradient, reference)

    # With its usual eps, Adam divides an entry that all but cancels by itself, round-off and all.
    adam = relaxed(optax.adam(1e-2, eps=1.0))
    before, after = optax.chain(ogpsa_project(1), adam), optax.chain(adam, ogpsa_project(1))
    assert_close(step(ogpsa(adam, 1, placement="gradient"))[0], step(before)[0])
    assert_close(step(ogpsa(adam, 1, placement="update"))[0], step(after)[0])
    both = optax.chain(ogpsa_project(1), adam, ogpsa_project(1))
    updates, state = step(ogpsa(adam, 1, placement="both"))
    assert_close(updates, step(both)[0])
    held = sum(leaf.size for leaf in jax.tree.leaves(state.projection.basis))
    assert held == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_conflict_measures_agreement_of_an_update_against_its_direction(rng):
    params, reference = random_tree(rng), random_tree(rng)
    gradient = jax.tree.map(jnp.negative, reference)
    tx = ogpsa(optax.sgd(1.0), 1, placement="update", rule="conflict", scale=2.0)
    state = jax.jit(refresh)(tx.init(params), [reference])
    update = jax.jit(tx.update)
    opposed, _ = update(gradient, state, params)
    agreed, _ = update(reference, state, params)
    assert_close(agreed, jax.tree.map(lambda r: -2.0 * r, reference))
    for leaf, size in zip(jax.tree.leaves(opposed), jax.tree.leaves(reference), strict=True):
        assert np.linalg.norm(leaf) < 1e-6 * np.linalg.norm(size)


def test_diagnostics_measure_what_each_rule_removed(rng):
    gradient, reference = random_tree(rng), random_tree(rng)
    g, r = vectors(gradient, "global")[0], vectors(reference, "global")[0]
    share = (g @ r) ** 2 / (g @ g) / (r @ r)
    for rule, removed in {"orthogonal": share, "none": 0.0, "inplane": 1 - share}.items():
        _, state = project(gradient, [reference], 2, scope="global", rule=rule)
        told = jax.jit(diagnostics)(state)
        assert float(told["in_span_fraction"]) == pytest.approx(share, abs=1e-6)
        assert float(told["removed_fraction"]) == pytest.approx(removed, abs=1e-6)
        assert int(told["groups"]["all"]["effective_rank"]) == 1
        assert int(told["steps_since_refresh"]) == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rank": 0}, "rank must be an integer between 1 and 64, got 0"),
        ({"rank": 65}, "rank must be an integer between 1 and 64, got 65"),
        ({"rank": 1, "scope": "layer"}, "scope must be .*, got 'layer'"),
        ({"rank": 1, "rule": "threshold"}, "rule must be one of .*, got 'threshold'"),
        ({"rank": 1, "rank_tol": 0.0}, "rank_tol must be positive, got 0.0"),
        ({"rank": 1, "basis_dtype": "int8"}, "basis_dtype must be .*, got 'int8'"),
        ({"rank": 1, "stacked": 3}, "stacked must be .*, got 3"),
    ],
)
def test_an_argument_out_of_range_is_named_with_its_value(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        ogpsa_project(**settings)


def test_an_unknown_placement_is_named():
    with pytest.raises(ValueError, match=r"placement must be .*, got 'step'"):
        ogpsa(optax.sgd(1.0), 1, placement="step")


def test_what_cannot_be_refreshed_is_told(rng):
    params = random_tree(rng)
    with pytest.raises(ValueError, match=r"found no OgpsaState.*\(EmptyState"):
        refresh(optax.sgd(1.0).init(params), [params])
    state = ogpsa_project(1).init(params)
    with pytest.raises(ValueError, match="at least one reference"):
        refresh(state, [])
    with pytest.raises(ValueError, match="references: expected a tree shaped like the parameters"):
        refresh(state, [{"w": params["w"]}])
    with pytest.raises(ValueError, match=r"references: a leaf of shape \(8,\)"):
        refresh(state, [dict(params, b=jnp.zeros(8))])
