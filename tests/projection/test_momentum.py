"""What a refresh does to the first moments of the optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from ogpsa_jax import diagnostics, ogpsa, ogpsa_project, push_reference, refresh

from .helpers import exact, random_tree, vectors


def test_what_only_the_references_touch_does_not_leap(rng, relaxed):
    # As the rows of an embedding: 0 to 3 are trained on, 2 to 7 are in the references.
    def gradient(rows):
        leaf = np.zeros((8, 16), np.float32)
        leaf[rows] = 1e-3 * rng.standard_normal((len(rows), 16))
        return {"embedding": jnp.asarray(leaf)}

    params = {"embedding": jnp.zeros((8, 16))}
    tx = ogpsa(relaxed(optax.adamw(1.0)), 2, placement="update")
    state = tx.init(params)
    for step in range(6):
        if step % 3 == 0:
            references = [gradient([2, 3, 4, 5, 6, 7]) for _ in range(2)]
            state = refresh(state, references, project_momentum=True)
        updates, state = tx.update(gradient([0, 1, 2, 3]), state, params)
        assert float(jnp.abs(updates["embedding"]).max()) < 10  # learning rates


def test_leaves_of_one_optimizer_among_several_are_projected_alone(rng, relaxed):
    params, gradient, reference = (random_tree(rng) for _ in range(3))
    parts = {
        "adam": relaxed(optax.adam(0.1)),
        "frozen": optax.set_to_zero(),
        "momentum": optax.sgd(1, 0.9),
    }
    labels = {"w": "adam", "layers": "frozen", "b": "adam"}
    tx = optax.chain(ogpsa_project(1, stacked={"layers": 0}), optax.partition(parts, labels))
    _, state = tx.update(gradient, tx.init(params), params)
    state = jax.jit(lambda s, r: refresh(s, [r], project_momentum=True))(state, reference)
    moment = state[1].inner_states["adam"].inner_state[0].mu
    for name in ("w", "b"):
        desired = exact(
            0.1 * vectors({name: gradient[name]})[0], [vectors({name: reference[name]})[0]]
        )
        np.testing.assert_allclose(np.ravel(moment[name]), desired, atol=1e-6)
    assert isinstance(moment["layers"], optax.MaskedNode)


@pytest.mark.parametrize(
    ("rule", "sign", "kept"),
    [
        ("none", 1.0, [1.0, 1.0]),
        ("orthogonal", 1.0, [0.0, 1.0]),
        ("inplane", 1.0, [1.0, 0.0]),
        ("conflict", 1.0, [1.0, 1.0]),  # the moment agrees with the reference
        ("conflict", -1.0, [0.0, 1.0]),
    ],
)
def test_the_rule_of_the_projection_is_that_of_the_moment(rule, sign, kept):
    tx = optax.chain(optax.trace(0.9), ogpsa_project(1, rule=rule))
    _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
    state = refresh(state, [jnp.array([sign, 0.0])], project_momentum=True)
    np.testing.assert_allclose(state[0].trace, kept)


def momentum_of(tx, rng, **settings):
    """The state of `tx` after two steps and a refresh, and the reference."""
    params, reference = random_tree(rng), random_tree(rng)
    tx = optax.chain(ogpsa_project(1, **settings), tx)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(random_tree(rng), state, params)
    return jax.jit(lambda s, r: refresh(s, [r], project_momentum=True))(state, reference), reference


def assert_orthogonal(moment, reference, names):
    vectors = [np.ravel(np.float64(moment[name])) for name in names]
    along = [np.ravel(np.float64(reference[name])) for name in names]
    product = sum(x @ y for x, y in zip(vectors, along, strict=True))
    lengths = np.linalg.norm(np.concatenate(vectors)), np.linalg.norm(np.concatenate(along))
    assert abs(product) < 1e-6 * lengths[0] * lengths[1]
    assert lengths[0] > 0


def test_a_global_group_spread_over_optimizers_is_projected_in_each(rng, relaxed):
    parts = {"adam": relaxed(optax.adam(0.1)), "momentum": optax.sgd(0.1, 0.9)}
    tx = optax.partition(parts, {"w": "adam", "layers": "momentum", "b": "momentum"})
    state, reference = momentum_of(tx, rng, scope="global")
    inner = state[1].inner_states
    assert_orthogonal(inner["adam"].inner_state[0].mu, reference, ["w"])
    assert_orthogonal(inner["momentum"].inner_state[0].trace, reference, ["layers", "b"])
    assert int(diagnostics(state)["projected_moments"]) == 3


def test_a_global_group_under_muon_is_projected(rng, relaxed):
    state, reference = momentum_of(relaxed(contrib.muon(0.1)), rng, scope="global")
    inner = state[1].inner_states
    assert_orthogonal(inner["muon"].inner_state[0].mu, reference, ["w"])
    assert_orthogonal(inner["adam"].inner_state[0].mu, reference, ["layers", "b"])
    assert int(diagnostics(state)["projected_moments"]) == 3


@pytest.mark.parametrize("rule", ["orthogonal", "conflict"])
def test_a_global_group_under_a_mask_is_projected_where_there_is_a_moment(rng, rule):
    params, reference = random_tree(rng), random_tree(rng)
    mask = {"w": True, "layers": False, "b": True}
    tx = optax.chain(
        ogpsa_project(2, scope="global", rule=rule), optax.masked(optax.trace(1), mask)
    )
    against = jax.tree.map(jnp.negative, reference)
    _, state = tx.update(against, tx.init(params))
    state = refresh(state, [reference], project_momentum=True)
    # All of it pointed against the reference; what is left is the round-off of one subtraction.
    for name, leaf in state[1].inner_state.trace.items():
        if name != "layers":
            assert np.max(np.abs(leaf)) < 1e-6 * np.max(np.abs(reference[name]))


def test_masks_of_whole_branches_are_seen_through(rng):
    def tree():
        return {"head": random_tree(rng), "body": random_tree(rng)}

    params, reference = tree(), tree()
    tx = optax.chain(
        optax.masked(ogpsa_project(1), {"head": True, "body": False}),
        optax.partition(
            {"momentum": optax.sgd(0.1, 0.9), "other": optax.sgd(0.1, 0.8)},
            {"head": "momentum", "body": "other"},
        ),
    )
    _, state = tx.update(tree(), tx.init(params), params)
    body = state[1].inner_states["other"].inner_state[0].trace["body"]
    state = refresh(state, [reference], project_momentum=True)
    inner = state[1].inner_states
    for name in ("w", "layers", "b"):
        moment = inner["momentum"].inner_state[0].trace["head"]
        assert_orthogonal(moment, reference["head"], [name])
    assert jax.tree.all(
        jax.tree.map(jnp.array_equal, inner["other"].inner_state[0].trace["body"], body)
    )


class Homemade(NamedTuple):
    """As someone's own optimizer may keep it."""

    count: Any
    buffer: Any


def homemade():
    def update(updates, state, params=None):
        del params
        buffer = jax.tree.map(lambda b, g: 0.9 * b + g, state.buffer, updates)
        return buffer, Homemade(state.count + 1, buffer)

    return optax.GradientTransformation(
        lambda params: Homemade(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)),
        update,
    )


def test_what_is_not_known_is_asked_for(rng):
    params, reference = random_tree(rng), random_tree(rng)
    tx = optax.chain(ogpsa_project(1), homemade())
    _, state = tx.update(random_tree(rng), tx.init(params))
    with pytest.raises(ValueError, match=r"opt_state\[1\]\.buffer in Homemade .* not known"):
        refresh(state, [reference], project_momentum=True)
    with pytest.raises(ValueError, match=r"opt_state\[1\]\.buffer in Homemade .* not known"):
        push_reference(state, reference, project_momentum=True)
    done = refresh(state, [reference], project_momentum={r"\.buffer": True})
    assert int(diagnostics(done)["projected_moments"]) == 3
    assert_orthogonal(done[1].buffer, reference, ["w"])
    left = refresh(state, [reference], project_momentum={r"\.buffer": False})
    assert jax.tree.all(jax.tree.map(jnp.array_equal, left[1].buffer, state[1].buffer))
    with pytest.raises(ValueError, match="'bufer' fits no path"):
        refresh(state, [reference], project_momentum={r"\.buffer": False, "bufer": True})


def test_a_state_without_names_is_asked_for(rng):
    params, reference = random_tree(rng), random_tree(rng)
    state = ogpsa_project(1).init(params)
    with pytest.raises(ValueError, match=r"opt_state\[0\] in tuple .* not known"):
        refresh((params, state), [reference], project_momentum=True)
    new = refresh({"params": params, "state": state}, [reference], project_momentum=True)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, new["params"], params))


def test_moments_of_another_shape_are_refused(rng):
    params, reference = random_tree(rng), random_tree(rng)
    tx = optax.chain(ogpsa_project(1), optax.flatten(optax.trace(0.9)))
    with pytest.raises(ValueError, match=r"opt_state\[1\]\.trace is a first moment that is not"):
        refresh(tx.init(params), [reference], project_momentum=True)
    # At full rank GaLore's moments have the parameters' shapes, in other coordinates.
    tx = optax.chain(ogpsa_project(1), contrib.galore(0.1, rank=8))
    state = tx.init({"w": jnp.zeros((4, 4))})
    with pytest.raises(ValueError, match=r"GaLoreState .* low-rank spaces of its own"):
        refresh(state, [{"w": jnp.ones((4, 4))}], project_momentum=True)


def test_lookahead_is_refused(rng):
    params, reference = random_tree(rng), random_tree(rng)
    tx = optax.lookahead(optax.chain(ogpsa_project(1), optax.sgd(0.1, 0.9)), 2, 0.5)
    state = tx.init(optax.LookaheadParams.init_synced(params))
    with pytest.raises(ValueError, match="LookaheadState"):
        refresh(state, [reference], project_momentum=True)


def test_a_parameter_named_as_a_moment_is_none(rng, relaxed):
    def tree():
        return {"m": random_tree(rng), "nu": {"mu": random_tree(rng)}}

    params = tree()
    tx = optax.chain(ogpsa_project(1), relaxed(optax.adam(0.1)))
    _, state = tx.update(tree(), tx.init(params), params)
    state = refresh(state, [tree()], project_momentum=True)
    assert int(diagnostics(state)["projected_moments"]) == 6


def test_what_has_yet_to_pass_through_the_projection_is_left(rng, relaxed):
    params, reference = random_tree(rng), random_tree(rng)
    inside = optax.chain(optax.trace(0.9), ogpsa_project(1))
    tx = relaxed(optax.MultiSteps(inside, 3).gradient_transformation())
    _, state = tx.update(random_tree(rng), tx.init(params), params)
    new = refresh(state, [reference], project_momentum=True)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, new.acc_grads, state.acc_grads))
    assert int(diagnostics(new)["projected_moments"]) == 3


def test_entries_without_a_gradient_stay_where_the_accumulator_is_small_and_not_zero(rng, relaxed):
    gradient = {"w": jnp.zeros(16).at[:8].set(1e-3)}
    for make in (optax.adabelief, optax.adam):
        tx = optax.chain(ogpsa_project(1), relaxed(make(1.0)))
        params = jax.tree.map(jnp.zeros_like, gradient)
        _, state = tx.update(gradient, tx.init(params), params)
        noise = {"w": jnp.asarray(rng.standard_normal(16), jnp.float32)}
        state = refresh(state, [noise], project_momentum=True)
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, gradient), state, params)
        assert float(jnp.abs(updates["w"][8:]).max()) == 0.0
