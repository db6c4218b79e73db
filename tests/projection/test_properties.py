"""Properties that hold for every set of references: any rank, any scale, however degenerate.

Of all rules, placements, scopes and both kinds of subspace to which a property applies; see
`properties`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ogpsa_jax import diagnostics, ogpsa_project, refresh

from .helpers import assert_close, exact, project, random_tree, vectors
from .properties import (
    KINDS,
    RANKS,
    Projector,
    any_scale,
    assert_equals_dense,
    assert_homogeneous,
    assert_idempotent,
    assert_invariant_to_reference_order,
    assert_invariant_to_reference_scale,
    assert_linear,
    assert_never_longer,
    assert_orthogonal_to_references,
    assert_orthonormal_basis,
    assert_symmetric,
    sample,
    stored_bases,
)

WHOLE = [  # of all that the references span
    Projector(),
    Projector(placement="both", rank=3, count=1),
    Projector(placement="update", scope="global", layers=True),
    Projector("inputs", placement="gradient", rank=20),
    Projector("inputs", placement="update", rank=20),
]
CUT = [  # of the principal directions
    Projector(rank=2, layers=True),
    Projector("inputs", placement="both", rank=2),
    Projector("inputs", placement="update", rank=20, energy=0.9),
]
KEPT = [Projector(rule="inplane", layers=True), Projector("inputs", rule="inplane", rank=20)]
CONFLICT = [
    Projector(rule="conflict", scope="global"),
    Projector(rule="conflict", placement="update", scale=0.5),
]
NONE = [Projector(rule="none"), Projector("inputs", rule="none", rank=20)]


def on(*projectors):
    """Each kind of references with each projector."""

    def mark(test):
        test = pytest.mark.parametrize("projector", projectors, ids=Projector.name)(test)
        return pytest.mark.parametrize("kind", KINDS)(test)

    return mark


@on(*WHOLE, *CUT, *KEPT, *CONFLICT, *NONE)
def test_equals_the_dense_method(rng, projector, kind):
    gradient = projector.gradient(rng, any_scale(rng))
    assert_equals_dense(projector, gradient, sample(projector, kind, rng))


@on(*WHOLE)
def test_orthogonal_to_the_references(rng, projector, kind):
    gradient = projector.gradient(rng, any_scale(rng))
    assert_orthogonal_to_references(projector, gradient, sample(projector, kind, rng))


@on(*WHOLE, *CUT, *KEPT, CONFLICT[0])
def test_idempotent(rng, projector, kind):
    gradient = projector.gradient(rng, any_scale(rng))
    assert_idempotent(projector, gradient, sample(projector, kind, rng))


@on(*WHOLE, *CUT, *KEPT)
def test_symmetric_and_linear(rng, projector, kind):
    scale, references = any_scale(rng), sample(projector, kind, rng)
    gradient, other = (projector.gradient(rng, scale) for _ in range(2))
    assert_symmetric(projector, gradient, other, references)
    assert_linear(projector, gradient, other, references)


@on(*CONFLICT)
def test_homogeneous(rng, projector, kind):
    factor = 10.0 ** rng.uniform(-5, 5)
    gradient, references = projector.gradient(rng), sample(projector, kind, rng)
    assert_homogeneous(projector, gradient, references, factor)


@on(*WHOLE, *CUT, *KEPT, *CONFLICT)
def test_never_longer(rng, projector, kind):
    gradient = projector.gradient(rng, any_scale(rng))
    assert_never_longer(projector, gradient, sample(projector, kind, rng))


@on(*WHOLE, *CUT, *KEPT, *CONFLICT)
def test_invariant_to_scale_and_order_of_the_references(rng, projector, kind):
    gradient, references = projector.gradient(rng), sample(projector, kind, rng)
    assert_invariant_to_reference_scale(projector, gradient, references, rng)
    assert_invariant_to_reference_order(projector, gradient, references, rng)


@on(*WHOLE, *CUT)
def test_the_basis_is_orthonormal_and_its_rank_that_of_the_references(rng, projector, kind):
    references = sample(projector, kind, rng)
    state = assert_orthonormal_basis(projector, projector.gradient(rng), references)
    if kind in RANKS and projector.energy == 1:
        rank = min(RANKS[kind], projector.rank, projector.count)
        assert np.all(np.asarray(state.rank_used) == rank)
    assert int(state.refreshes) == 1


def test_tensor_scope_on_one_leaf_is_global_scope(rng):
    gradient, *references = ({"w": random_tree(rng)["w"]} for _ in range(5))
    one, _ = project(gradient, references, 2, scope="tensor")
    all_, _ = project(gradient, references, 2, scope="global")
    assert_close(one, all_)


def test_rank_64_equals_the_dense_method(rng):
    draw = lambda: {"w": jnp.asarray(rng.standard_normal((20, 15)), jnp.float32)}  # noqa: E731
    gradient, *references = (draw() for _ in range(65))
    out, state = project(gradient, references, 64)
    desired = exact(vectors(gradient)[0], [vectors(r)[0] for r in references])
    # The smallest eigenvalue of 64 random directions out of 300 is about a quarter.
    size = np.linalg.norm(vectors(gradient)[0])
    np.testing.assert_allclose(vectors(out)[0], desired, atol=1e-5 * size)
    basis_NxK = np.stack([vectors(tree)[0] for tree in state.basis], axis=1)
    np.testing.assert_allclose(basis_NxK.T @ basis_NxK, np.eye(64), atol=1e-6)


def test_the_coverage_is_the_share_of_the_principal_directions(rng):
    gradient, *references = ({"w": random_tree(rng)["w"]} for _ in range(7))
    _, state = project(gradient, references, 2)
    units = np.stack([vectors(r)[0] / np.linalg.norm(vectors(r)[0]) for r in references])
    singular = np.linalg.svd(units, compute_uv=False)
    coverage = np.sum(singular[:2] ** 2) / np.sum(singular**2)
    np.testing.assert_allclose(diagnostics(state)["reference_coverage"], coverage, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_basis_of_low_precision_projects_exactly_onto_what_it_stores(rng, dtype):
    gradient, references = random_tree(rng), [random_tree(rng) for _ in range(4)]
    out, state = project(gradient, references, 4, basis_dtype=dtype)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.basis))
    parts = zip(vectors(gradient), vectors(out), stored_bases(Projector(), state), strict=True)
    for before, after, basis_NxK in parts:
        assert np.max(np.abs(basis_NxK.T @ after)) < 3e-6 * np.linalg.norm(before)


def test_a_refused_refresh_changes_nothing_but_its_count(rng):
    gradient, good = random_tree(rng), [random_tree(rng) for _ in range(4)]
    _, state = project(gradient, good, 4)
    bad = [dict(tree) for tree in good]
    bad[int(rng.integers(4))]["layers"] = jnp.full((3, 4, 6), rng.choice([np.nan, np.inf]))
    after = jax.jit(refresh)(state, bad)
    names = [name for name in vars(state) if name not in ("refused_refreshes", "settings")]
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert int(after.refused_refreshes) == 1


def test_a_gradient_that_is_not_finite_reaches_its_own_group_only(rng):
    gradient, references = random_tree(rng), [random_tree(rng) for _ in range(4)]
    bad = dict(gradient, b=gradient["b"].at[3].set(jnp.inf))
    out, _ = project(bad, references, 4)
    clean, _ = project(gradient, references, 4)
    assert_close(dict(out, b=clean["b"]), clean)
    assert not np.all(np.isfinite(out["b"]))
    # Absent directions have no weight, so an infinite entry stays the only one.
    alone, _ = jax.jit(ogpsa_project(2).update)(bad, ogpsa_project(2).init(bad))
    np.testing.assert_array_equal(alone["b"], bad["b"])
