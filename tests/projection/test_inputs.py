"""Subspaces of inputs: what they hold, where they stand, and every way in which they can fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogpsa_jax import (
    InputState,
    Kernel,
    SecondMoment,
    column_adamw,
    diagnostics,
    flax_kernels,
    ogpsa,
    ogpsa_project,
    reference_gradients,
    refresh,
    second_moment,
)

from . import dense
from .helpers import assert_close
from .input_helpers import (
    KERNELS,
    assert_orthogonal_to_inputs,
    exact,
    inputs_of,
    moments_of,
    transformation,
    tree,
)


def test_the_basis_holds_the_share_and_no_more_columns_than_it_needs(rng):
    inputs = inputs_of(rng, count=12)
    tx = transformation(energy=0.8)
    state = refresh(tx.init(tree(rng)), moments=moments_of(inputs))
    for name, x in inputs.items():
        x = x.reshape(-1, *x.shape[-2:])
        u = np.asarray(state.basis[name], np.float64).reshape(len(x), x.shape[-1], -1)
        group = diagnostics(state)["groups"][name]
        ranks = np.asarray(group["effective_rank"]).reshape(-1)
        held = np.asarray(group["reference_coverage"]).reshape(-1)
        for i in range(len(x)):
            share = np.sum((x[i] @ u[i]) ** 2) / np.sum(x[i] ** 2)
            np.testing.assert_allclose(held[i], share, atol=1e-5)
            assert share >= 0.8
            assert ranks[i] == dense.input_basis(x[i], x[i].shape[1], 0.8).shape[1]


def test_a_cap_below_the_energy_is_told_with_the_share_that_is_held(rng):
    inputs = inputs_of(rng, count=12)
    tx = transformation(rank=2, energy=0.99)
    state = refresh(tx.init(tree(rng)), moments=moments_of(inputs))
    x = inputs["dense"]
    u = dense.input_basis(x, 2, 1.0)
    found = diagnostics(state)["groups"]["dense"]
    share = np.sum((x @ u) ** 2) / np.sum(x**2)
    np.testing.assert_allclose(found["reference_coverage"], share, atol=1e-5)
    assert share < 0.99
    np.testing.assert_allclose(found["dimension_fraction"], 2 / 6)
    assert state.basis["attention"].shape == (3, 7, 2)


def test_reference_losses_do_not_move_at_all_in_a_linear_model(rng):
    """Not only to first order: what no input sees changes nothing, however large the step."""
    x, w = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 8), (8, 5)))
    tx = ogpsa_project(8, subspace="inputs", energy=1.0, kernels={"w": Kernel()})
    state = refresh(tx.init({"w": w}), moments={"w": second_moment(x)})
    step, _ = tx.update({"w": jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)}, state)
    np.testing.assert_allclose(x @ (w + 100 * step["w"]), x @ w, atol=2e-3)


@pytest.mark.parametrize("placement", ["gradient", "update", "both"])
def test_both_placements_keep_adam_out_of_the_subspace(rng, placement):
    inputs, params = inputs_of(rng), tree(rng)
    tx = ogpsa(
        optax.adamw(0.1, weight_decay=0.01),
        20,
        placement=placement,
        subspace="inputs",
        energy=1.0,
        kernels=KERNELS,
    )
    state = refresh(tx.init(params), moments=moments_of(inputs))
    for _ in range(3):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = jax.jit(tx.update)(tree(rng), state, params)
    if placement == "gradient":  # Adam divides by entry, and weight decay shrinks along U
        with pytest.raises(AssertionError):
            assert_orthogonal_to_inputs(updates, inputs, 1e-2)
    else:
        assert_orthogonal_to_inputs(updates, inputs)


def test_column_adamw_commutes_with_the_projection(rng):
    inputs, params = inputs_of(rng), tree(rng)
    tx = optax.chain(transformation(energy=1.0), column_adamw(0.1, kernels=KERNELS))
    state = refresh(tx.init(params), moments=moments_of(inputs))
    for _ in range(3):
        updates, state = jax.jit(tx.update)(tree(rng), state, params)
    assert_orthogonal_to_inputs(updates, inputs)
    nu = state[1][0].nu
    assert nu["dense"].shape == (1, 5)
    assert nu["layers"]["o"].shape == (2, 1, 1, 8)
    assert nu["bias"].shape == (5,)


def test_column_adamw_is_adamw_where_there_is_one_input(rng):
    params = {"w": jnp.asarray(rng.standard_normal((1, 5)), jnp.float32)}
    ours, theirs = column_adamw(0.1, kernels={"w": Kernel()}), optax.adamw(0.1, weight_decay=0.0)
    states = [ours.init(params), theirs.init(params)]
    for _ in range(4):
        gradient = {"w": jnp.asarray(rng.standard_normal((1, 5)), jnp.float32)}
        mine, states[0] = ours.update(gradient, states[0], params)
        with jax.numpy_dtype_promotion("standard"):
            yours, states[1] = theirs.update(gradient, states[1], params)
        assert_close(mine, yours, 2e-5)


def test_others_are_frozen_left_or_projected_off_a_gradient_span(rng):
    inputs, gradient, reference = inputs_of(rng), tree(rng), tree(rng)
    moments = moments_of(inputs)
    frozen, _ = _updated(transformation(), gradient, moments=moments)
    assert not np.any(frozen["bias"])
    assert not np.any(frozen["embedding"])
    left, _ = _updated(transformation(others="leave"), gradient, moments=moments)
    assert_close(left["bias"], gradient["bias"], 0)
    tx = transformation(others="gradients", others_rank=1)
    updates, state = _updated(tx, gradient, [reference], moments=moments)
    for name in ("bias", "embedding"):
        overlap = np.vdot(np.asarray(updates[name]), np.asarray(reference[name]))
        assert abs(overlap) < 1e-5 * np.linalg.norm(reference[name])
    assert_close(updates["dense"], frozen["dense"])
    assert {"['bias']", "attention"} <= set(diagnostics(state)["groups"])


def _updated(tx, gradient, *references, **more):
    state = jax.jit(refresh)(tx.init(gradient), *references, **more)
    return jax.jit(tx.update)(gradient, state)


def test_the_identity_until_the_first_refresh(rng):
    gradient = tree(rng)
    tx = transformation(others="leave")
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient))
    assert_close(updates, gradient, 0)
    assert float(diagnostics(state)["reference_coverage"]) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_moments_that_are_not_finite_change_nothing_and_are_counted(rng, bad):
    gradient, moments = tree(rng), moments_of(inputs_of(rng))
    tx = transformation()
    before = refresh(tx.init(gradient), moments=moments)
    worse = dict(moments)
    worse["attention"] = SecondMoment(
        moments["attention"].product.at[1, 2, 3].set(bad), moments["attention"].trace
    )
    after = jax.jit(refresh)(before, moments=worse)
    assert_close(after.basis, before.basis, 0)
    assert int(after.refused_refreshes) == 1
    assert int(after.refreshes) == 1


def test_a_gradient_that_is_not_finite_stays_so_and_is_not_spread(rng):
    gradient = tree(rng)
    gradient["dense"] = gradient["dense"].at[0, 0].set(jnp.inf)
    updates, _ = jax.jit(transformation().update)(gradient, transformation().init(gradient))
    np.testing.assert_array_equal(updates["dense"], gradient["dense"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("basis_dtype", [None, "bfloat16"])
def test_dtypes_are_kept_and_a_rounded_basis_projects_exactly_onto_its_own_span(
    rng, dtype, basis_dtype
):
    inputs, gradient = inputs_of(rng), tree(rng, dtype)
    tx = transformation(energy=1.0, basis_dtype=basis_dtype)
    state = refresh(tx.init(gradient), moments=moments_of(inputs))
    updates, state = jax.jit(tx.update)(gradient, state)
    jax.tree.map(lambda u, g: np.testing.assert_equal(u.dtype, g.dtype), updates, gradient)
    assert state.basis["attention"].dtype == (basis_dtype or dtype)
    if dtype == "float32":
        u = np.asarray(state.basis["dense"].astype(jnp.float32), np.float64)
        u = u[:, np.any(u, axis=0)]
        g = np.asarray(gradient["dense"], np.float64)
        want = g - u @ np.linalg.solve(u.T @ u, u.T @ g)
        assert_close(updates["dense"], want, 2e-6)


def test_nothing_compiles_anew_and_donated_states_work(rng):
    gradient = tree(rng)
    tx = optax.chain(transformation(), optax.sgd(0.1))
    update = jax.jit(tx.update, donate_argnums=1)
    again = jax.jit(refresh, donate_argnums=0)
    state = tx.init(gradient)
    for _ in range(3):
        state = again(state, moments=moments_of(inputs_of(rng)))
        _, state = update(gradient, state)
    assert update._cache_size() == 1
    assert int(diagnostics(state)["refreshes"]) == 3


def test_kernels_need_not_be_in_the_tree_of_a_wrapper(rng):
    """Masked and partitioned: only what is there is projected, and the rest of the group is not."""
    inputs, gradient = inputs_of(rng), tree(rng)
    labels = jax.tree.map(lambda _: "ours", gradient)
    labels["layers"]["v"] = "other"
    ours = optax.chain(transformation(energy=1.0, others="leave"), optax.sgd(1.0))
    tx = optax.partition({"ours": ours, "other": optax.sgd(1.0)}, labels)
    state = refresh(tx.init(gradient), moments=moments_of(inputs))
    updates, _ = jax.jit(tx.update)(gradient, state)
    want = exact(gradient, inputs)
    assert_close(updates["layers"]["q"], -want["layers"]["q"], 2e-6)
    assert_close(updates["layers"]["v"], -gradient["layers"]["v"], 0)
    assert_close(updates["bias"], -gradient["bias"], 0)


def test_first_moments_are_projected_with_the_new_subspace(rng, relaxed):
    inputs, gradient = inputs_of(rng), tree(rng)
    tx = optax.chain(transformation(energy=1.0), relaxed(optax.trace(0.9)))
    state = tx.init(gradient)
    _, state = jax.jit(tx.update)(gradient, state)
    again = jax.jit(refresh, static_argnames="project_momentum")
    state = again(state, moments=moments_of(inputs), project_momentum=True)
    assert_orthogonal_to_inputs(state[1].trace, inputs)


def test_both_kinds_of_subspace_in_one_chain(rng):
    inputs, gradient, reference = inputs_of(rng), tree(rng), tree(rng)
    spans = lambda path, leaf: "span" if "bias" in jax.tree_util.keystr(path) else None  # noqa: E731
    tx = optax.chain(
        transformation(energy=1.0, others="leave"), ogpsa_project(1, scope=spans), optax.sgd(1.0)
    )
    state = refresh(tx.init(gradient), [reference], moments=moments_of(inputs))
    updates, state = jax.jit(tx.update)(gradient, state)
    assert isinstance(state[0], InputState)
    assert_orthogonal_to_inputs(updates, inputs)
    assert abs(np.vdot(updates["bias"], reference["bias"])) < 1e-5


def test_flax_kernels_takes_dense_layers_alone():
    found = {
        name: flax_kernels(path, leaf) is not None
        for name, tree in {
            "dense": {"Dense_0": {"kernel": jnp.zeros((2, 3))}},
            "bias": {"Dense_0": {"bias": jnp.zeros(3)}},
            "conv": {"Conv_0": {"kernel": jnp.zeros((3, 3, 2, 4))}},
            "embedding": {"Embed_0": {"embedding": jnp.zeros((5, 2))}},
        }.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    assert found == {"dense": True, "bias": False, "conv": False, "embedding": False}


def test_reference_gradients_vanish_along_the_step(rng):
    """To first order, no reference loss changes: the gradient of a linear layer is in the span."""
    x = jnp.asarray(rng.standard_normal((1, 4, 6)), jnp.float32)
    params = {"kernel": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)}
    tx = ogpsa_project(6, subspace="inputs", energy=1.0, kernels=flax_kernels)
    loss = lambda p, batch: jnp.mean(jnp.tanh(batch @ p["kernel"]) ** 2)  # noqa: E731
    state = refresh(tx.init(params), moments={"kernel": second_moment(x)})
    gradient = {"kernel": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)}
    updates, _ = tx.update(gradient, state)
    (reference,) = reference_gradients(loss, params, [x])
    products = itertools.starmap(
        lambda a, b: np.vdot(np.asarray(a, np.float64), np.asarray(b, np.float64)),
        zip(jax.tree.leaves(updates), jax.tree.leaves(reference), strict=True),
    )
    norms = optax.global_norm(updates) * optax.global_norm(reference)
    assert abs(sum(products)) < 1e-5 * float(norms)
