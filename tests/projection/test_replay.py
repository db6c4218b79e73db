"""A reference batch in every step: required, added, and refused where they contradict."""

import jax
import optax
import pytest

from ogpsa_jax import (
    ogpsa,
    ogpsa_project,
    refresh,
)

from .helpers import assert_close
from .input_helpers import KERNELS, exact, inputs_of, moments_of, tree


@pytest.mark.parametrize("subspace", ["gradients", "inputs"])
def test_replay_needs_the_reference_and_adds_it(rng, subspace):
    params, gradient, reference = tree(rng), tree(rng), tree(rng)
    settings = {"window": 1} if subspace == "gradients" else {}
    if subspace == "inputs":
        settings = {"subspace": "inputs", "kernels": KERNELS, "energy": 1.0, "others": "leave"}
    tx = ogpsa(optax.sgd(1.0), 20 if subspace == "inputs" else 1, replay=0.5, **settings)
    state, inputs = tx.init(params), inputs_of(rng)
    if subspace == "inputs":
        state = refresh(state, moments=moments_of(inputs))
    updates, _ = jax.jit(tx.update)(gradient, state, params, reference=reference)
    if subspace == "inputs":  # what is replayed is projected too
        both = jax.tree.map(lambda g, r: -(g + 0.5 * r), gradient, reference)
        want = exact(both, inputs)
        assert_close(updates["dense"], want["dense"], 3e-6)
        assert_close(updates["bias"], both["bias"], 1e-6)
    else:
        one = ogpsa_project(1)
        plain, _ = one.update(gradient, refresh(one.init(params), [reference]))
        want = jax.tree.map(lambda g, r: -(g + 0.5 * r), plain, reference)
        assert_close(updates, want, 3e-6)
    with pytest.raises(ValueError, match="the keyword reference"):
        tx.update(gradient, state, params)


@pytest.mark.parametrize("wrap", ["partition", "multi_steps", "train_state"])
def test_a_wrapper_that_drops_the_reference_raises_at_once(rng, wrap):
    params, gradient, reference = tree(rng), tree(rng), tree(rng)
    tx = ogpsa(optax.sgd(1.0), 1, replay=1.0)
    if wrap == "partition":
        tx = optax.partition({"all": tx}, jax.tree.map(lambda _: "all", params))
        state = tx.init(params)
        tx.update(gradient, state, params, reference=reference)  # it passes keywords on
        with pytest.raises(ValueError, match="the keyword reference"):
            tx.update(gradient, state, params)
    elif wrap == "multi_steps":
        tx = optax.MultiSteps(tx, 2)
        state = tx.init(params)
        with pytest.raises(ValueError, match="the keyword reference"):
            tx.update(gradient, state, params)
    else:
        train_state = pytest.importorskip("flax.training.train_state")
        state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
        with pytest.raises(ValueError, match="the keyword reference"):
            state.apply_gradients(grads=gradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay": -1.0}, "replay must be"),
        ({"replay": 1.0, "placement": "update"}, "takes the replayed gradient out"),
        ({"window": 0}, "window must be"),
        ({"window": 1, "subspace": "inputs", "kernels": KERNELS}, "made by refresh"),
    ],
)
def test_replay_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        ogpsa(optax.sgd(1.0), 1, **settings)
