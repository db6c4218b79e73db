"""Inside everything of Optax: the state is found and refreshed, and the step is the projected one.

With plain SGD at rate 1 the step of every wrapper is known: minus the projected gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from ogpsa_jax import diagnostics, ogpsa_project, refresh

from .helpers import assert_close, exact

SGD = optax.sgd(1.0)


def tree(rng):
    return {
        name: jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for name, shape in (("a", (4, 3)), ("b", (5,)))
    }


def projected(gradient, reference, names=("a", "b")):
    """Minus the gradient, without the reference in the leaves named."""
    out = {}
    for name, g in gradient.items():
        flat, r = np.asarray(g, np.float64).ravel(), np.asarray(reference[name], np.float64).ravel()
        flat = exact(flat, [r]) if name in names else flat
        out[name] = jnp.asarray(-flat.reshape(g.shape), jnp.float32)
    return out


def check(tx, rng, names=("a", "b"), **extra):
    """One refresh and one step, jitted; returns the new state."""
    params, gradient, reference = (tree(rng) for _ in range(3))

    @jax.jit
    def run(params, gradient, reference):
        state = refresh(tx.init(params), [reference], project_momentum=True)
        return tx.update(gradient, state, params, **extra)

    updates, state = run(params, gradient, reference)
    assert_close(updates, projected(gradient, reference, names), 2e-6)
    assert int(diagnostics(state)["refreshes"]) == 1
    return state


@pytest.mark.parametrize(
    "tx",
    {
        "first": optax.chain(ogpsa_project(1), SGD),
        "last": optax.chain(SGD, ogpsa_project(1)),
        "middle": optax.chain(optax.identity(), ogpsa_project(1), SGD),
        "nested": optax.chain(optax.chain(optax.identity(), optax.chain(ogpsa_project(1))), SGD),
        "named": optax.named_chain(("ogpsa", ogpsa_project(1)), ("sgd", SGD)),
        "twice": optax.chain(ogpsa_project(1), SGD, ogpsa_project(2, scope="tensor")),
    }.items(),
    ids=lambda item: item[0],
)
def test_chain_in_every_position(rng, tx):
    check(tx[1], rng)


def test_masked_leaves_the_others_alone(rng):
    check(optax.chain(optax.masked(ogpsa_project(1), {"a": True, "b": False}), SGD), rng, ("a",))


def test_partition_gives_each_part_its_own_basis(rng):
    parts = {"kept": optax.chain(ogpsa_project(1), SGD), "other": SGD}
    check(optax.partition(parts, {"a": "other", "b": "kept"}), rng, ("b",))
    both = {"one": optax.chain(ogpsa_project(1), SGD), "two": optax.chain(ogpsa_project(2), SGD)}
    check(optax.multi_transform(both, {"a": "one", "b": "two"}), rng)


def test_a_scope_that_freezes_equals_masking(rng):
    scope = lambda path, leaf: None if "b" in jax.tree_util.keystr(path) else "rest"  # noqa: E731
    check(optax.chain(ogpsa_project(1, scope=scope), SGD), rng, ("a",))


def test_freeze_still_freezes(rng):
    tx = optax.chain(ogpsa_project(1), SGD, optax.freeze({"a": False, "b": True}))
    params, gradient, reference = (tree(rng) for _ in range(3))
    state = jax.jit(refresh)(tx.init(params), [reference])
    updates, _ = jax.jit(tx.update)(gradient, state, params)
    assert not jnp.any(updates["b"])
    assert_close(updates["a"], projected(gradient, reference)["a"])


def test_multi_steps_takes_a_refresh_in_mid_accumulation(rng, relaxed):
    chain = optax.chain(ogpsa_project(1), SGD)
    tx = relaxed(optax.MultiSteps(chain, 2).gradient_transformation())
    params, first, second, old, new = (tree(rng) for _ in range(5))
    update, again = jax.jit(tx.update), jax.jit(refresh)
    state = again(tx.init(params), [old])
    updates, state = update(first, state, params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    updates, state = update(second, again(state, [new]), params)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    assert_close(updates, projected(mean, new), 2e-6)
    assert int(state.inner_opt_state[0].steps_since_refresh) == 1


def test_accumulating_before_or_after_the_projection_is_the_same(rng, relaxed):
    inside = optax.MultiSteps(optax.chain(ogpsa_project(1), SGD), 2).gradient_transformation()
    after = optax.chain(ogpsa_project(1), optax.MultiSteps(SGD, 2).gradient_transformation())
    params, first, second, reference = (tree(rng) for _ in range(4))
    steps = []
    for tx in (relaxed(inside), relaxed(after)):
        state = jax.jit(refresh)(tx.init(params), [reference])
        update = jax.jit(tx.update)
        for gradient in (first, second):
            updates, state = update(gradient, state, params)
        steps.append(updates)
    assert_close(*steps, 3e-6)


def test_inject_hyperparams_schedules_the_scale(rng, relaxed):
    # Shapes depend on the rank, and callables are taken for schedules: these must be static.
    make = optax.inject_hyperparams(ogpsa_project, static_args=("rank", "rank_tol", "scope"))
    scales = optax.linear_schedule(2.0, 3.0, 1)
    tx = relaxed(make(rank=1, rule="conflict", scale=scales, scope=lambda path, leaf: "all"))
    params, reference = tree(rng), tree(rng)
    state = jax.jit(refresh)(jax.jit(tx.init)(params), [reference])
    update = jax.jit(tx.update)
    for factor in (2.0, 3.0):
        updates, state = update(reference, state, params)
        assert_close(updates, jax.tree.map(lambda r: factor * r, reference))  # noqa: B023


def test_inject_hyperparams_around_the_whole_chain(rng):
    def make(learning_rate):
        return optax.chain(ogpsa_project(1, basis_dtype="float32"), optax.sgd(learning_rate))

    check(optax.inject_hyperparams(make)(learning_rate=1.0), rng)


def test_inject_hyperparams_without_a_static_rank_is_refused(rng):
    tx = optax.inject_hyperparams(ogpsa_project)(rank=1)
    with pytest.raises(ValueError, match="rank must be an integer"):
        jax.jit(tx.init)(tree(rng))


def test_apply_if_finite_keeps_a_bad_step_out(rng):
    tx = optax.apply_if_finite(optax.chain(ogpsa_project(1), SGD), 2)
    state = check(tx, rng)
    params = tree(rng)
    bad = dict(tree(rng), b=jnp.full(5, jnp.nan))
    updates, after = jax.jit(tx.update)(bad, state, params)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


def test_flatten_makes_one_vector_of_all_and_takes_references_flattened_alike(rng):
    # optax.flatten hands the chain one vector: its state cannot tell how the tree was.
    tx = optax.flatten(optax.chain(ogpsa_project(1), SGD))
    params, gradient, reference = (tree(rng) for _ in range(3))
    state = tx.init(params)
    with pytest.raises(ValueError, match="references: expected a tree shaped like the parameters"):
        refresh(state, [reference])
    flat = lambda t: jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(t)])  # noqa: E731
    state = jax.jit(refresh)(state, [flat(reference)])
    updates, _ = jax.jit(tx.update)(gradient, state, params)
    g, r = (np.asarray(flat(t), np.float64) for t in (gradient, reference))
    desired = -exact(g, [r])
    np.testing.assert_allclose(flat(updates), desired, atol=3e-6)


def test_lookahead_projects_the_fast_steps(rng, relaxed):
    chain = optax.chain(ogpsa_project(1), SGD)
    tx = relaxed(optax.lookahead(chain, sync_period=3, slow_step_size=0.5))
    params, gradient, reference = (tree(rng) for _ in range(3))
    pair = optax.LookaheadParams.init_synced(params)
    state = jax.jit(refresh)(tx.init(pair), [reference])
    updates, state = jax.jit(tx.update)(gradient, state, pair)
    assert_close(updates.fast, projected(gradient, reference), 2e-6)
    assert int(diagnostics(state)["steps_since_refresh"]) == 1


def test_schedule_free_projects_the_base_step(rng, relaxed):
    chain = optax.chain(ogpsa_project(1), SGD)
    tx = relaxed(optax.contrib.schedule_free(chain, learning_rate=1.0, b1=0.0))
    params, gradient, reference = (tree(rng) for _ in range(3))
    state = jax.jit(refresh)(tx.init(params), [reference])
    _, state = jax.jit(tx.update)(gradient, state, params)
    moved = jax.tree.map(jnp.add, params, projected(gradient, reference))
    assert_close(state.z, moved, 2e-6)


def test_sam_projects_where_it_stands(rng, relaxed):
    adversary = optax.chain(ogpsa_project(1), optax.sgd(0.1))
    tx = relaxed(optax.contrib.sam(SGD, adversary, sync_period=2, reset_state=False))
    params, gradient, reference = (tree(rng) for _ in range(3))
    state = jax.jit(refresh)(tx.init(params), [reference])
    updates, state = jax.jit(tx.update)(gradient, state, params)
    # The adversary climbs, so SAM negates its step.
    assert_close(updates, jax.tree.map(lambda u: -0.1 * u, projected(gradient, reference)), 2e-6)
    assert int(diagnostics(state)["refreshes"]) == 1


def test_sam_projects_the_outer_step_and_forgets_an_adversary_it_resets(rng, relaxed):
    chain = optax.chain(ogpsa_project(1), SGD)
    adversary = optax.chain(ogpsa_project(1), optax.sgd(0.1))
    tx = relaxed(optax.contrib.sam(chain, adversary, sync_period=2))
    start, gradient, reference = (tree(rng) for _ in range(3))
    params, state = start, jax.jit(refresh)(tx.init(start), [reference])
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    moved = jax.tree.map(jnp.subtract, params, start)
    assert_close(moved, projected(gradient, reference), 5e-6)
    assert int(state.opt_state[0].refreshes) == 1
    assert int(state.adv_state[0].refreshes) == 0  # reset_state=True, Optax's default


def test_line_searches_and_other_takers_of_extra_arguments_get_them(rng, relaxed):
    def loss(params):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    tx = relaxed(optax.chain(ogpsa_project(1), SGD, optax.scale_by_backtracking_linesearch(9)))
    params, reference = tree(rng), tree(rng)

    @jax.jit
    def run(params, reference):
        state = refresh(tx.init(params), [reference])
        value, gradient = jax.value_and_grad(loss)(params)
        updates, _ = tx.update(gradient, state, params, value=value, grad=gradient, value_fn=loss)
        return loss(optax.apply_updates(params, updates)) - value

    assert run(params, reference) < 0


def test_takes_its_arguments_by_name(rng):
    tx = ogpsa_project(1)
    params = tree(rng)
    updates, _ = tx.update(updates=params, state=tx.init(params), params=params, obj_fn=None)
    jax.tree.map(np.testing.assert_array_equal, updates, params)
