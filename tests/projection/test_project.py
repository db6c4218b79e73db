"""What the projection does to gradients, by property."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogpsa_jax import diagnostics, first_order_change, ogpsa_project, refresh


def random_tree(rng):
    return {
        "w": jnp.asarray(rng.standard_normal((7, 5)), jnp.float32),
        "layers": jnp.asarray(rng.standard_normal((3, 4, 6)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal(9), jnp.float32),
    }


def project(gradient, references, rank, **settings):
    tx = ogpsa_project(rank, **settings)
    state = refresh(tx.init(gradient), references)
    return tx.update(gradient, state, gradient)


def vectors(tree, scope, stacked):
    """The tree as one float64 vector per group."""
    leaves = {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}
    if scope == "global":
        return [np.concatenate([leaf.ravel() for _, leaf in sorted(leaves.items())])]
    parts = []
    for name, leaf in sorted(leaves.items()):
        parts += [row.ravel() for row in leaf] if stacked and name == "layers" else [leaf.ravel()]
    return parts


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("stacked", [None, {"layers": 0}])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_numpy_float64_qr(rng, scope, stacked, count):
    gradient = random_tree(rng)
    references = [random_tree(rng) for _ in range(count)]
    out, _ = project(gradient, references, 3, scope=scope, stacked=stacked)
    rows = [vectors(tree, scope, stacked) for tree in references]
    for i, (g, actual) in enumerate(
        zip(vectors(gradient, scope, stacked), vectors(out, scope, stacked), strict=True)
    ):
        q, _ = np.linalg.qr(np.stack([row[i] for row in rows], axis=1))
        np.testing.assert_allclose(actual, g - q @ (q.T @ g), atol=2e-6 * np.linalg.norm(g))


def test_is_the_identity_before_the_first_refresh(rng):
    gradient = random_tree(rng)
    tx = ogpsa_project(2)
    out, _ = tx.update(gradient, tx.init(gradient), gradient)
    jax.tree.map(np.testing.assert_array_equal, out, gradient)


def test_non_finite_references_leave_the_basis_in_place_and_are_counted(rng):
    gradient, good = random_tree(rng), random_tree(rng)
    tx = optax.chain(ogpsa_project(1), optax.sgd(1.0))
    state = refresh(tx.init(gradient), [good])
    bad = dict(good, b=good["b"].at[0].set(rng.choice([np.nan, np.inf, -np.inf])))
    after = refresh(state, [bad])
    jax.tree.map(np.testing.assert_array_equal, after[0].basis, state[0].basis)
    assert diagnostics(after)["refused_refreshes"] == 1
    assert diagnostics(after)["refreshes"] == 1


def test_a_step_projected_after_the_optimizer_leaves_reference_losses_to_first_order(rng, relaxed):
    params = random_tree(rng)
    references = [random_tree(rng) for _ in range(2)]
    tx = optax.chain(relaxed(optax.adamw(1e-2, weight_decay=0.1)), ogpsa_project(2))
    state = refresh(tx.init(params), references)
    updates, _ = tx.update(random_tree(rng), state, params)
    np.testing.assert_allclose(first_order_change(references, updates), 0.0, atol=1e-6)


def test_refresh_projects_first_moments(rng, relaxed):
    params = random_tree(rng)
    reference = random_tree(rng)
    tx = optax.chain(ogpsa_project(1, scope="global"), relaxed(optax.adam(1e-2)))
    _, state = tx.update(random_tree(rng), tx.init(params), params)
    state = jax.jit(lambda s, r: refresh(s, [r], project_momentum=True))(state, reference)
    moment = state[1][0].mu
    assert abs(float(first_order_change([reference], moment)[0])) < 1e-6
