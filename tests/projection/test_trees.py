"""Any tree a user may have, and whatever JAX does with a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogpsa_jax import (
    diagnostics,
    ogpsa_project,
    push_reference,
    reference_gradients,
    refresh,
)

from .helpers import assert_close, exact, fuses_on_cpu, random_tree


def as_float64(leaf):
    return np.asarray(leaf.astype(jnp.float32), np.float64).ravel()


def test_odd_leaves_of_every_dtype(rng):
    def tree():
        return {
            "f32": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
            "bf16": jnp.asarray(rng.standard_normal(33), jnp.bfloat16),
            "f16": jnp.asarray(rng.standard_normal((2, 1, 5)), jnp.float16),
            "scalar": jnp.asarray(rng.standard_normal(), jnp.float32),
            "empty": jnp.zeros((0, 3), jnp.float32),
            "long": jnp.asarray(rng.standard_normal(1_000_003), jnp.float32),
            "none": None,
            "masked": optax.MaskedNode(),
            "steps": jnp.asarray(7, jnp.int32),
        }

    params, gradient, reference = tree(), tree(), tree()
    tx = ogpsa_project(1, basis_dtype="float32")
    state = jax.jit(refresh)(tx.init(params), [reference])
    updates, after = jax.jit(tx.update)(gradient, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(gradient)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    # One rounding of the result to the leaf's own precision.
    for name, tolerance in {"f32": 1e-6, "long": 2e-6, "bf16": 2**-8, "f16": 2**-10}.items():
        assert updates[name].dtype == gradient[name].dtype
        desired = exact(as_float64(gradient[name]), [as_float64(reference[name])])
        np.testing.assert_allclose(
            as_float64(updates[name]), desired, atol=tolerance * np.max(np.abs(desired))
        )
    assert abs(float(updates["scalar"])) < 1e-6 * abs(float(gradient["scalar"]))
    assert updates["steps"] == 7


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match=r"params: \['w'\] is complex"):
        ogpsa_project(1).init({"w": jnp.zeros(2, jnp.complex64)})


def test_parameters_without_a_leaf_to_project_are_refused():
    with pytest.raises(ValueError, match="no floating-point leaf"):
        ogpsa_project(1).init({"w": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match=r"stacked: axis 2 given for \['w'\]"):
        ogpsa_project(1, stacked={"w": 2}).init({"w": jnp.zeros((2, 3))})


def test_a_label_over_different_numbers_of_layers_is_refused():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4, 3))}
    tx = ogpsa_project(1, scope=lambda path, leaf: "all", stacked={".": 0})
    with pytest.raises(ValueError, match="different numbers of layers, 2, 4"):
        tx.init(params)


def test_a_stacked_leaf_equals_its_layers_apart_along_any_axis(rng):
    axis = int(rng.integers(3))
    whole = [jnp.asarray(rng.standard_normal((3, 4, 5)), jnp.float32) for _ in range(3)]
    layers = [dict(enumerate(jnp.moveaxis(leaf, axis, 0))) for leaf in whole]

    def run(tx, gradient, *references):
        return tx.update(gradient, refresh(tx.init(gradient), references))[0]

    stacked = jax.jit(lambda *t: run(ogpsa_project(2, stacked={"": axis}), *t))(*whole)
    apart = jax.jit(lambda *t: run(ogpsa_project(2), *t))(*layers)
    assert_close(jnp.moveaxis(stacked, axis, 0), jnp.stack(list(apart.values())), 5e-6)


def test_never_recompiles_and_scans_and_branches(rng):
    params, reference, gradient = (random_tree(rng) for _ in range(3))
    tx = optax.chain(ogpsa_project(2), optax.sgd(0.1))
    traces = []

    @jax.jit
    def step(gradient, state, params):
        traces.append(1)
        return tx.update(gradient, state, params)

    again = jax.jit(refresh)
    state = tx.init(params)
    shapes = jax.eval_shape(again, state, [reference])
    for _ in range(2):
        updates, state = step(gradient, state, params)
        state = again(state, [reference])
    assert len(traces) == 1
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert jax.tree.map(jnp.result_type, shapes) == jax.tree.map(jnp.result_type, state)

    @jax.jit
    def scanned(state):
        def body(carry, due):
            params, state = carry
            state = jax.lax.cond(due, lambda s: refresh(s, [reference]), lambda s: s, state)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(body, (params, state), jnp.array([True, False]))

    updates, state = step(gradient, state, params)
    (_, after), steps = scanned(tx.init(params))
    assert_close(jax.tree.map(lambda leaf: leaf[1], steps), updates, 2e-6)
    assert int(after[0].steps_since_refresh) == 2


def test_map_params_reaches_the_basis_and_nothing_else(rng):
    params = random_tree(rng)
    tx = optax.chain(ogpsa_project(2), optax.sgd(0.1))
    state = tx.init(params)
    marked = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert all(jnp.all(leaf == 1) for leaf in jax.tree.leaves(marked[0].basis))
    assert not jnp.any(marked[0].gram)


def test_a_tree_whose_leaves_are_all_masked_passes_through(rng):
    params = random_tree(rng)
    parts = {"all": optax.chain(ogpsa_project(1), optax.sgd(1.0)), "none": ogpsa_project(1)}
    tx = optax.partition(parts, jax.tree.map(lambda leaf: "all", params))
    state = jax.jit(refresh)(tx.init(params), [params])
    _, state = jax.jit(tx.update)(params, state, params)
    told = diagnostics(state)
    assert int(told["refreshes"]) == 1
    assert float(told["removed_fraction"]) == pytest.approx(1.0, abs=1e-5)


def test_nothing_is_aliased_so_that_all_can_be_donated(rng):
    params = random_tree(rng)
    tx = ogpsa_project(3)
    state = tx.init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)
    push = jax.jit(lambda state, tree: push_reference(state, tree), donate_argnums=0)
    push(state, random_tree(rng))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.basis))


@fuses_on_cpu
@pytest.mark.parametrize("basis_dtype", ["float32", "bfloat16"])
def test_a_step_needs_no_temporary_of_parameter_size(basis_dtype, relaxed):
    params = {"a": jnp.zeros((512, 512)), "b": jnp.zeros((512, 256))}
    tx = optax.chain(ogpsa_project(4, basis_dtype=basis_dtype), relaxed(optax.adamw(1e-3)))

    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), params)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < params["b"].nbytes / 4


def test_a_reference_under_other_names_is_refused():
    params = {"q": jnp.zeros(3), "k": jnp.zeros(3)}
    state = ogpsa_project(1).init(params)
    with pytest.raises(ValueError, match="got a leaf at a where they have k"):
        refresh(state, [{"a": jnp.ones(3), "b": jnp.ones(3)}])
    with pytest.raises(ValueError, match=r"references: .* no name where they have k"):
        refresh(state, [(jnp.ones(3), jnp.ones(3))])


@pytest.mark.parametrize(
    ("leaf", "told"),
    [
        (jnp.tanh, "is a (Pjit|function|PjitFunction)"),
        (0.5, "is a float"),
        ("relu", "is a str"),
        (jnp.arange(3), "is an array of int32"),
        (jax.random.key(0), "is an array of key"),
    ],
)
def test_what_gradients_cannot_be_taken_of_is_named(leaf, told):
    def loss(params, batch):
        return jnp.sum(params["w"]) * batch

    params = {"w": jnp.ones(2), "other": leaf}
    with pytest.raises(ValueError, match=rf"params: \['other'\] {told}.*equinox.partition"):
        reference_gradients(loss, params, [jnp.ones(2)])
    if not hasattr(leaf, "dtype"):
        with pytest.raises(ValueError, match=rf"params: \['other'\] {told} and no array"):
            ogpsa_project(1).init(params)
    arrays, batches = {"w": params["w"], "other": None}, [jnp.ones(2)]
    assert reference_gradients(loss, arrays, batches)[0]["other"] is None
