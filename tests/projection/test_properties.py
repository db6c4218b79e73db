"""Properties that hold for every set of references: any rank, any scale, however degenerate.

All sets of one test have one shape, so that each property compiles once.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogpsa_jax import diagnostics, ogpsa_project, refresh

from .helpers import assert_close, exact, project, random_tree, vectors

COUNT = 4


def unlike(rng):
    return [random_tree(rng) for _ in range(COUNT)]


def duplicated(rng):
    trees = unlike(rng)
    return [trees[0], trees[1], trees[0], trees[0]]


def collinear(rng):
    first, second, other, _ = unlike(rng)
    near = jax.tree.map(lambda x, y: x + jnp.float32(1e-7) * y, first, other)
    return [first, near, second, jax.tree.map(jnp.negative, near)]


def dependent(rng):
    trees = unlike(rng)
    return [*trees[:3], jax.tree.map(lambda x, y, z: x - 2 * y + z, *trees[:3])]


def partly_zero(rng):
    trees = unlike(rng)
    trees[1] = jax.tree.map(jnp.zeros_like, trees[1])
    trees[2] = dict(trees[2], w=jnp.zeros_like(trees[2]["w"]))
    return trees


def scaled(rng):
    return [random_tree(rng, 10.0 ** rng.uniform(-15, 15)) for _ in range(COUNT)]


def all_zero(rng):
    return [jax.tree.map(jnp.zeros_like, tree) for tree in unlike(rng)]


KINDS = [unlike, duplicated, collinear, dependent, partly_zero, scaled, all_zero]


def residuals(out, references):
    """Largest overlap of a group's projected gradient with a unit reference."""
    worst = 0.0
    for i, vector in enumerate(vectors(out)):
        for tree in references:
            reference = vectors(tree)[i]
            norm = np.linalg.norm(reference)
            worst = max(worst, abs(reference @ vector) / norm if norm else 0.0)
    return worst


def norm(tree):
    return np.sqrt(sum(v @ v for v in vectors(tree)))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_result_is_orthogonal_smaller_and_final(rng, kind):
    for _ in range(3):
        references = kind(rng)
        scale = 10.0 ** rng.uniform(-15, 15)
        gradient = random_tree(rng, scale)
        out, state = project(gradient, references, COUNT)
        size = norm(gradient)
        assert residuals(out, references) < 3e-6 * size
        assert norm(out) <= size * (1 + 1e-6)
        again, _ = project(out, references, COUNT)
        assert norm(jax.tree.map(jnp.subtract, again, out)) < 3e-6 * size
        other = random_tree(rng, scale)
        sum_first = project(jax.tree.map(jnp.add, gradient, other), references, COUNT)[0]
        sum_last = jax.tree.map(jnp.add, out, project(other, references, COUNT)[0])
        assert norm(jax.tree.map(jnp.subtract, sum_first, sum_last)) < 1e-5 * size
        assert_orthonormal(state)


def assert_orthonormal(state):
    """The basis to 1e-6, in the directions that are present; the others exactly zero."""
    trees = [vectors(tree) for tree in state.basis]
    for i, rank in enumerate(np.asarray(state.rank_used)):
        q = np.stack([tree[i] for tree in trees])
        present = np.linalg.norm(q, axis=1) > 0
        assert np.sum(present) == rank
        np.testing.assert_allclose(q[present] @ q[present].T, np.eye(rank), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "rank"), [(unlike, 4), (duplicated, 2), (collinear, 2), (dependent, 3), (all_zero, 0)]
)
def test_counts_the_directions_that_are_there(rng, kind, rank):
    _, state = project(random_tree(rng), kind(rng), COUNT)
    assert np.all(np.asarray(state.rank_used) == rank)


@pytest.mark.parametrize("kind", [unlike, duplicated, scaled], ids=lambda kind: kind.__name__)
def test_order_sign_and_scale_of_the_references_do_not_matter(rng, kind):
    gradient, references = random_tree(rng), kind(rng)
    changed = []
    for i in rng.permutation(COUNT):
        factor = jnp.float32(rng.choice([-1, 1]) * 10.0 ** rng.uniform(-5, 5))
        changed.append(jax.tree.map(lambda x, f=factor: f * x, references[i]))
    out, _ = project(gradient, references, COUNT)
    other, _ = project(gradient, changed, COUNT)
    assert norm(jax.tree.map(jnp.subtract, out, other)) < 1e-5 * norm(gradient)


@pytest.mark.parametrize("kind", [unlike, scaled], ids=lambda kind: kind.__name__)
def test_what_rules_keep_and_remove_adds_up(rng, kind):
    gradient, references = random_tree(rng), kind(rng)
    kept, _ = project(gradient, references, COUNT)
    removed, _ = project(gradient, references, COUNT, rule="inplane")
    assert_close(jax.tree.map(jnp.add, kept, removed), gradient, 3e-6)


def test_tensor_scope_on_one_leaf_is_global_scope(rng):
    gradient, *references = ({"w": random_tree(rng)["w"]} for _ in range(5))
    one, _ = project(gradient, references, 2, scope="tensor")
    all_, _ = project(gradient, references, 2, scope="global")
    assert_close(one, all_)


def test_rank_64_equals_qr(rng):
    draw = lambda: {"w": jnp.asarray(rng.standard_normal((20, 15)), jnp.float32)}  # noqa: E731
    gradient, *references = (draw() for _ in range(65))
    out, state = project(gradient, references, 64)
    desired = exact(vectors(gradient)[0], [vectors(r)[0] for r in references])
    # The smallest eigenvalue of 64 random directions out of 300 is about a quarter.
    np.testing.assert_allclose(vectors(out)[0], desired, atol=1e-5 * norm(gradient))
    assert_orthonormal(state)


def test_more_references_than_rank_keep_the_principal_directions(rng):
    gradient, *references = ({"w": random_tree(rng)["w"]} for _ in range(7))
    out, state = project(gradient, references, 2)
    units = np.stack([vectors(r)[0] / np.linalg.norm(vectors(r)[0]) for r in references])
    _, singular, rows = np.linalg.svd(units, full_matrices=False)
    g = vectors(gradient)[0]
    desired = g - rows[:2].T @ (rows[:2] @ g)
    # The directions turn by round-off over the gap between eigenvalues.
    gap = singular[1] ** 2 - singular[2] ** 2
    np.testing.assert_allclose(vectors(out)[0], desired, atol=1e-5 / gap * norm(gradient))
    coverage = np.sum(singular[:2] ** 2) / np.sum(singular**2)
    np.testing.assert_allclose(diagnostics(state)["reference_coverage"], coverage, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_basis_of_low_precision_projects_exactly_onto_what_it_stores(rng, dtype):
    gradient, references = random_tree(rng), unlike(rng)
    out, state = project(gradient, references, COUNT, basis_dtype=dtype)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.basis))
    assert residuals(out, state.basis) < 3e-6 * norm(gradient)


def test_a_refused_refresh_changes_nothing_but_its_count(rng):
    gradient, good = random_tree(rng), unlike(rng)
    _, state = project(gradient, good, COUNT)
    bad = [dict(tree) for tree in good]
    bad[int(rng.integers(COUNT))]["layers"] = jnp.full((3, 4, 6), rng.choice([np.nan, np.inf]))
    after = jax.jit(refresh)(state, bad)
    names = [name for name in vars(state) if name not in ("refused_refreshes", "settings")]
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert int(after.refused_refreshes) == 1


def test_a_gradient_that_is_not_finite_reaches_its_own_group_only(rng):
    gradient, references = random_tree(rng), unlike(rng)
    bad = dict(gradient, b=gradient["b"].at[3].set(jnp.inf))
    out, _ = project(bad, references, COUNT)
    clean, _ = project(gradient, references, COUNT)
    assert_close(dict(out, b=clean["b"]), clean)
    assert not np.all(np.isfinite(out["b"]))
    # Absent directions have no weight, so an infinite entry stays the only one.
    alone, _ = jax.jit(ogpsa_project(2).update)(bad, ogpsa_project(2).init(bad))
    np.testing.assert_array_equal(alone["b"], bad["b"])
