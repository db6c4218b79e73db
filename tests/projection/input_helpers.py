"""Kernels of every layout, inputs of them, and what NumPy says of their projection in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from ogpsa_jax import (
    Kernel,
    ogpsa_project,
    second_moment,
)

# A dense kernel, two that share inputs in every layer, one with two input axes, and the rest.
SHAPES = {
    "dense": (6, 5),
    "layers": {"q": (3, 7, 4), "v": (3, 7, 2), "o": (2, 3, 5, 8)},
    "embedding": (9, 6),
    "bias": (5,),
}
KERNELS = {
    "dense": Kernel(),
    r"\['(q|v)'\]": Kernel("attention", stacked=(0,)),
    r"\['o'\]": Kernel("output", axes=(1, 2), stacked=(0,)),
}
WIDTHS = {"dense": (6,), "attention": (3, 7), "output": (2, 15)}


def tree(rng, dtype=jnp.float32, scale=1.0):
    return jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.standard_normal(shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def inputs_of(rng, count=4, scale=1.0):
    """Inputs ``[..., count, in]`` of every kernel, float64.

    Their singular values are apart, so that a leading eigenvector is known to some float32 units:
    an error of one unit turns it by that over the gap of the squares, a tenth here.
    """

    def draw(shape):
        x = rng.standard_normal((*shape[:-1], count, shape[-1]))
        left, values, right = np.linalg.svd(x, full_matrices=False)
        return scale * (left * np.linspace(1.0, 0.4, values.shape[-1])) @ right

    return {name: draw(shape) for name, shape in WIDTHS.items()}


def moments_of(inputs, **settings):
    def one(x):
        fn = lambda x: second_moment(x, **settings)  # noqa: E731
        for _ in range(x.ndim - 2):
            fn = jax.vmap(fn)
        return fn(jnp.asarray(x, jnp.float32))

    return {name: one(x) for name, x in inputs.items()}


def transformation(rank=20, **settings):
    return ogpsa_project(rank, subspace="inputs", kernels=KERNELS, **settings)


def exact_basis(x, energy=1.0):
    """The leading eigenvectors that hold the share, by float64 eigen-decomposition."""
    values, vectors = np.linalg.eigh(x.T @ x)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = int(np.sum(np.cumsum(values) - values < energy * np.sum(values) * (1 - 1e-12)))
    return vectors[:, : min(count, np.linalg.matrix_rank(x))]


def exact(gradient, inputs, energy=1.0):
    """The projected gradient in float64; leaves that are no matrices zero."""
    out = jax.tree.map(lambda g: np.zeros(g.shape), gradient)

    def off(g, x):
        u = exact_basis(x, energy)
        return g - u @ (u.T @ g)

    def wide(leaf):
        return np.asarray(leaf, np.float64)

    out["dense"] = off(wide(gradient["dense"]), inputs["dense"])
    for name in ("q", "v"):
        g = wide(gradient["layers"][name])
        out["layers"][name] = np.stack([off(g[i], inputs["attention"][i]) for i in range(3)])
    g = wide(gradient["layers"]["o"]).reshape(2, 15, 8)
    off_o = np.stack([off(g[i], inputs["output"][i]) for i in range(2)])
    out["layers"]["o"] = off_o.reshape(SHAPES["layers"]["o"])
    return out


def assert_orthogonal_to_inputs(updates, inputs, tolerance=1e-5):
    """No reference input sees the step: ``xᵀ ΔW`` is round-off."""
    pairs = [(updates["dense"], inputs["dense"])]
    pairs += [
        (updates["layers"][n][i], inputs["attention"][i]) for n in ("q", "v") for i in range(3)
    ]
    pairs += [(updates["layers"]["o"][i].reshape(15, 8), inputs["output"][i]) for i in range(2)]
    for w, x in pairs:
        w = np.asarray(w, np.float64)
        change = x @ w
        assert np.linalg.norm(change) <= tolerance * np.linalg.norm(x) * np.linalg.norm(w)
