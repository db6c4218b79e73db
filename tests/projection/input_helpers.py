"""Kernels of every layout, inputs of them, and what NumPy says of their projection in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from ogpsa_jax import (
    Kernel,
    ogpsa_project,
    second_moment,
)

from . import dense

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
# Every matrix: its leaf, its layer, and what it multiplies.
MATRICES = [
    ("dense", None, "dense"),
    *[("q", layer, "attention") for layer in range(3)],
    *[("v", layer, "attention") for layer in range(3)],
    *[("o", layer, "output") for layer in range(2)],
]


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


def matrices(tree):
    """Every matrix ``[in, out]`` of a tree in float64, in the order of `MATRICES`."""
    found = []
    for name, layer, source in MATRICES:
        leaf = tree["dense"] if layer is None else tree["layers"][name][layer]
        found.append(np.asarray(leaf, np.float64).reshape(WIDTHS[source][-1], -1))
    return found


def inputs_by_matrix(inputs):
    """What each of `MATRICES` multiplies, as float64 rows."""
    pairs = [(inputs[source], layer) for _, layer, source in MATRICES]
    return [np.asarray(x if layer is None else x[layer], np.float64) for x, layer in pairs]


def exact(gradient, inputs, energy=1.0):
    """The projected gradient in float64; leaves that are no matrices zero."""
    out = jax.tree.map(lambda g: np.zeros(g.shape), gradient)
    found = zip(MATRICES, matrices(gradient), inputs_by_matrix(inputs), strict=True)
    for (name, layer, _), matrix, x in found:
        leaf = out["dense"] if layer is None else out["layers"][name][layer]
        left = dense.project(matrix, dense.input_basis(x, x.shape[1], energy))
        leaf[...] = left.reshape(leaf.shape)
    return out


def assert_orthogonal_to_inputs(updates, inputs, tolerance=1e-5):
    """No reference input sees the step: ``xᵀ ΔW`` is round-off."""
    for matrix, x in zip(matrices(updates), inputs_by_matrix(inputs), strict=True):
        change = np.linalg.norm(x @ matrix)
        assert change <= tolerance * np.linalg.norm(x) * np.linalg.norm(matrix)
