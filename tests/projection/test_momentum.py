"""What a refresh does to the first moments of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ogpsa_jax import ogpsa, ogpsa_project, refresh

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
