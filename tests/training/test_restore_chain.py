import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogpsa_jax.training.checkpoints import Checkpoints
from ogpsa_jax.training.step import TrainState


def test_a_chain_that_starts_with_an_empty_state_is_restored(tmp_path):
    """As in a run without projection: tuples whose first entries hold no arrays."""
    params = {"w": jnp.arange(3.0)}
    states = (optax.identity().init(params), optax.chain(optax.clip(1.0), optax.adam(1.0)))
    state = TrainState(params, (states[0], states[1].init(params)))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(5, state)
    checkpoints.wait()
    like = jax.tree.map(lambda leaf: jnp.zeros_like(leaf), state)
    step, found = checkpoints.restore_newest(like)
    checkpoints.close()
    assert step == 5
    np.testing.assert_array_equal(found.params["w"], [0.0, 1.0, 2.0])
