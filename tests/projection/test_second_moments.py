"""Moments of inputs and of gradients, whole and as sketches."""

import jax
import jax.numpy as jnp
import numpy as np

from ogpsa_jax import (
    Kernel,
    diagnostics,
    flax_kernels,
    gradient_moments,
    input_moments,
    ogpsa_project,
    refresh,
    second_moment,
)

from .helpers import assert_close


def test_moments_add_up_over_batches_and_padding_does_not_count(rng):
    x = jnp.asarray(rng.standard_normal((3, 4, 6)), jnp.float32)
    mask = jnp.asarray(rng.integers(2, size=(3, 4)), bool)

    def collect(params, batch):
        return {"dense": second_moment(batch["x"] * params, batch["mask"])}

    found = jax.jit(lambda p, b: input_moments(collect, p, b))(2.0, {"x": x, "mask": mask})
    rows = 2.0 * np.asarray(x, np.float64)[np.asarray(mask)]
    assert_close(found["dense"].product, rows.T @ rows, 1e-6)
    np.testing.assert_allclose(found["dense"].trace, np.sum(rows**2), rtol=1e-6)


def test_gradient_moments_are_of_rows_that_weigh_the_same(rng):
    params = {"kernel": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)}
    x = rng.standard_normal((5, 6)) * np.array([1, 10, 100, 1e-3, 1])[:, None]
    y = rng.standard_normal((5, 3))

    def loss_fn(params, row):
        return jnp.sum((row["x"] @ params["kernel"] - row["y"]) ** 2)

    rows = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    found = gradient_moments(loss_fn, params, rows, kernels=flax_kernels)["kernel"]
    w = np.asarray(params["kernel"], np.float64)
    total = np.zeros((6, 6))
    for row, target in zip(x, y, strict=True):
        g = np.outer(row, 2 * (row @ w - target))
        g /= np.linalg.norm(g)
        total += g @ g.T
    assert_close(found.product, total, 1e-5)
    np.testing.assert_allclose(found.trace, 5.0, rtol=1e-5)
    sketch = gradient_moments(loss_fn, params, rows, kernels=flax_kernels, size=2)["kernel"]
    assert_close(sketch.product, total @ np.asarray(sketch.test_matrix(), np.float64), 1e-5)


def test_gradient_moments_span_the_inputs(rng):
    """Both sources hold the same subspace where every row is one input."""
    params = {"kernel": jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)}
    x = jnp.asarray(rng.standard_normal((3, 8)), jnp.float32)
    tx = ogpsa_project(8, subspace="inputs", energy=1.0, kernels=flax_kernels)

    def loss_fn(params, row):
        return jnp.sum(jnp.sin(row @ params["kernel"]))

    moments = gradient_moments(loss_fn, params, x, kernels=flax_kernels)
    gradient = {"kernel": jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)}
    projected = []
    for found in (moments, {"kernel": second_moment(x)}):
        state = refresh(tx.init(params), moments=found)
        projected.append(tx.update(gradient, state)[0])
    assert_close(projected[0], projected[1], 2e-5)


def test_a_sketch_states_its_error(rng):
    """Of a spectrum that decays a sketch holds nearly all, and never claims more than it has."""
    width, rows = 60, 400
    spectrum = 10.0 ** -np.linspace(0, 6, width)
    turn, _ = np.linalg.qr(rng.standard_normal((width, width)))
    x = (rng.standard_normal((rows, width)) * spectrum) @ turn.T
    params = {"dense": jnp.zeros((width, 3))}
    tx = ogpsa_project(8, subspace="inputs", energy=1.0, kernels={"dense": Kernel()})
    claimed, true = {}, {}
    for size in (None, 16):
        moment = second_moment(jnp.asarray(x, jnp.float32), size=size, seed=int(rng.integers(99)))
        if size is not None:
            assert moment.product.shape == (width, size)
        state = jax.jit(refresh)(tx.init(params), moments={"dense": moment})
        u = np.asarray(state.basis["dense"], np.float64)
        np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-6)
        claimed[size] = float(diagnostics(state)["reference_coverage"])
        true[size] = np.sum((x @ u) ** 2) / np.sum(x**2)
        assert claimed[size] <= true[size] + 1e-5
    # Expected error of the approximation (Tropp et al., theorem 4.1): (1 + 8 / (16 - 8 - 1)) of
    # what eight directions leave; here twice that.
    assert true[16] >= 1 - 2 * (1 + 8 / 7) * (1 - true[None])
