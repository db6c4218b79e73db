"""Properties of a projection as functions, and the grid of what they are asserted on.

A `Projector` is one way of using the package: a subspace, a rule, a placement, a rank. It maps a
gradient and references to what is left of the gradient. References are what spans the subspace:
gradients, or the inputs of layers. Either way a *part* of a gradient, one for each group, is a
float64 matrix whose columns are projected off the rows of a matrix of references.

References of every kind are combinations of unlike ones, all of one shape, so that each projector
compiles once. Comparisons are relative to the norm of the gradient's part; their tolerances are
some units of float32, over how far what is kept is from what is dropped.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ogpsa_jax import ogpsa, refresh

from . import dense, input_helpers
from .helpers import random_tree, vectors

UNITS = 3e-6  # of float32, a few dozen


class Projector(NamedTuple):
    """What is projected, by which rule, and where; hashable."""

    subspace: str = "gradients"
    rule: str = "orthogonal"
    placement: str = "gradient"
    rank: int = 4
    count: int = 4  # of references
    scope: str = "tensor"
    layers: bool = False  # whether stacked layers are groups of their own
    scale: float = 1.0
    energy: float = 1.0

    def name(self) -> str:
        """What is not as it is by default."""
        default, mine = Projector()._asdict(), self._asdict()
        return ", ".join(f"{k}={v}" for k, v in mine.items() if v != default[k]) or "default"

    def __call__(self, gradient: Any, references: Any) -> Any:
        """What is left of `gradient`."""
        return _run(self, gradient, references)[0]

    def state(self, gradient: Any, references: Any) -> Any:
        """The state of the projection afterwards."""
        return _run(self, gradient, references)[1].projection

    @property
    def of_inputs(self) -> bool:
        return self.subspace == "inputs"

    @property
    def cuts(self) -> bool:
        """Whether directions of the references are left out for the rank's or the share's sake."""
        return self.rank < self.count or self.energy < 1

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        more = {"scope": self.scope, "stacked": {"layers": 0} if self.layers else None}
        if self.of_inputs:
            more = {"subspace": "inputs", "energy": self.energy, "kernels": input_helpers.KERNELS}
        settings = {"rule": self.rule, "scale": self.scale, "placement": self.placement, **more}
        return ogpsa(optax.sgd(1.0), self.rank, **settings)

    def gradient(self, rng: np.random.Generator, scale: float = 1.0) -> Any:
        """A gradient with normally distributed entries."""
        return (input_helpers.tree if self.of_inputs else random_tree)(rng, scale=scale)

    def parts(self, tree: Any) -> list[np.ndarray]:
        """A gradient as one float64 matrix for each group: [N, 1], or [I, O] of inputs."""
        if self.of_inputs:
            return input_helpers.matrices(tree)
        return [v[:, None] for v in vectors(tree, self.scope, self.layers)]

    def reference_parts(self, references: Any) -> list[np.ndarray]:
        """The references of each part as rows: [M, N], or [C, I] of inputs."""
        if self.of_inputs:
            return input_helpers.inputs_by_matrix(references)
        rows = [vectors(tree, self.scope, self.layers) for tree in references]
        return [np.stack(row) for row in zip(*rows, strict=True)]

    def basis(self, references_MxN: np.ndarray) -> np.ndarray:
        """The dense basis of one part, as columns."""
        if self.of_inputs:
            return dense.input_basis(references_MxN, self.rank, self.energy)
        return dense.gradient_basis(references_MxN, self.rank)


@partial(jax.jit, static_argnums=0)
def _run(projector: Projector, gradient: Any, references: Any) -> Any:
    tx = projector.optimizer()
    if projector.of_inputs:
        state = refresh(tx.init(gradient), moments=input_helpers.moments_of(references))
    else:
        state = refresh(tx.init(gradient), references)
    updates, state = tx.update(gradient, state, gradient)
    return jax.tree.map(jnp.negative, updates), state


# Each kind of references as combinations of unlike ones, the rows of a matrix of weights.
KINDS: dict[str, list[list[float]]] = {
    "unlike": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    "duplicate": [[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]],
    "collinear": [[1, 0, 0, 0], [1, 0, 1e-7, 0], [0, 1, 0, 0], [-1, 0, -1e-7, 0]],
    "dependent": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, -2, 1, 0]],
    "partly zero": [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
    "all zero": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    "scaled": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
}
RANKS = {"unlike": 4, "duplicate": 2, "collinear": 2, "dependent": 3, "all zero": 0, "scaled": 4}


def sample(projector: Projector, kind: str, rng: np.random.Generator) -> Any:
    """References of a kind; where they are "scaled", from 1e-25 to 1e25 (inputs: 1e-14 to 1e14)."""
    count, inputs = projector.count, projector.of_inputs
    weights_MxM = np.asarray(KINDS[kind])[:count, :count]
    if kind == "scaled":
        exponents = rng.uniform(-14, 14) if inputs else rng.uniform(-25, 25, (count, 1))
        weights_MxM = weights_MxM * 10.0**exponents
    if inputs:
        unlike = input_helpers.inputs_of(rng, count)
        references = {n: jnp.asarray(weights_MxM @ x, jnp.float32) for n, x in unlike.items()}
        if kind == "partly zero":
            references["dense"] = references["dense"].at[-1].set(0.0)
        return references
    trees = [random_tree(rng) for _ in range(count)]

    def combined(weights_M: np.ndarray, *leaves: jax.Array) -> jax.Array:
        wide = np.stack([np.asarray(leaf, np.float64) for leaf in leaves])
        return jnp.asarray(np.tensordot(weights_M, wide, 1), jnp.float32)

    references = [jax.tree.map(partial(combined, row), *trees) for row in weights_MxM]
    if kind == "partly zero":
        references[-1]["w"] = jnp.zeros_like(references[-1]["w"])
    return references


def any_scale(rng: np.random.Generator) -> float:
    return 10.0 ** rng.uniform(-15, 15)


def tolerances(projector: Projector, references: Any) -> list[float]:
    """By part: some units of float32, times how much round-off turns the basis."""
    found = []
    for rows in projector.reference_parts(references):
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        largest = norms.max() or 1.0
        scaled = rows / largest if projector.of_inputs else rows / np.where(norms > 0, norms, 1.0)
        values = np.append(np.linalg.svd(scaled, compute_uv=False) ** 2, 0.0)
        kept = projector.basis(rows).shape[1]
        if not kept:
            found.append(UNITS)
            continue
        dropped = values[kept] if projector.cuts and values[kept] > 1e-6 * values[0] else 0.0
        apart = (values[kept - 1] - dropped) / values[0]
        found.append(UNITS / (apart if dropped or projector.of_inputs else np.sqrt(apart)))
    return found


def assert_parts_close(
    projector: Projector, actual: Any, desired: Any, sizes: list[float], within: list[float]
) -> None:
    """`actual` and `desired`, trees or lists of parts, differ by at most ``within · sizes``."""
    a, b = (x if isinstance(x, list) else projector.parts(x) for x in (actual, desired))
    for x, y, size, tolerance in zip(a, b, sizes, within, strict=True):
        assert np.linalg.norm(x - y) <= tolerance * size


def norms(projector: Projector, tree: Any) -> list[float]:
    return [float(np.linalg.norm(part)) for part in projector.parts(tree)]


def decided(projector: Projector, gradient: Any, references: Any) -> list[bool]:
    """By part: whether the conflict rule's decision does not hang on round-off."""
    found = []
    pairs = zip(projector.parts(gradient), projector.reference_parts(references), strict=True)
    for vector, rows in pairs:
        along = _agreement(projector, vector, rows) / np.linalg.norm(vector)
        found.append(projector.rule != "conflict" or along == 0 or abs(along) > 1e-4)
    return found


def _agreement(projector: Projector, vector: np.ndarray, rows: np.ndarray) -> float:
    """⟨sum of the unit references, component of the vector in the basis⟩."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units, basis = rows / np.where(lengths > 0, lengths, 1.0), projector.basis(rows)
    return float(units.sum(0) @ basis @ (basis.T @ vector)[:, 0])


def assert_equals_dense(projector: Projector, gradient: Any, references: Any) -> None:
    """What is left is what the dense method leaves in float64."""
    desired = []
    pairs = zip(projector.parts(gradient), projector.reference_parts(references), strict=True)
    for vector, rows in pairs:
        left = dense.project(vector, projector.basis(rows))
        if projector.rule == "inplane":
            left = vector - left
        elif projector.rule == "none":
            left = vector
        elif projector.rule == "conflict":
            agreement = _agreement(projector, vector, rows)
            left = projector.scale * vector if agreement > 0 else left if agreement < 0 else vector
        desired.append(left)
    actual, sizes = projector.parts(projector(gradient, references)), norms(projector, gradient)
    within = tolerances(projector, references)
    sure = decided(projector, gradient, references)
    within = [t if s else np.inf for t, s in zip(within, sure, strict=True)]
    assert_parts_close(projector, actual, desired, sizes, within)


def assert_orthogonal_to_references(projector: Projector, gradient: Any, references: Any) -> None:
    """No reference has a component along what is left; no reference input sees it."""
    left = projector.parts(projector(gradient, references))
    sizes, within = norms(projector, gradient), tolerances(projector, references)
    rows = projector.reference_parts(references)
    for part, row_MxN, size, tolerance in zip(left, rows, sizes, within, strict=True):
        lengths_M = np.linalg.norm(row_MxN, axis=1)
        if projector.of_inputs:  # only the largest are known to float32's precision
            lengths_M = np.full_like(lengths_M, lengths_M.max())
        overlaps = np.linalg.norm(row_MxN @ part, axis=1)
        assert np.all(overlaps <= tolerance * size * lengths_M)


def assert_idempotent(projector: Projector, gradient: Any, references: Any) -> None:
    """To project what is left changes nothing."""
    once = projector(gradient, references)
    twice, sizes = projector(once, references), norms(projector, gradient)
    assert_parts_close(projector, twice, once, sizes, [UNITS] * len(sizes))


def assert_symmetric(projector: Projector, gradient: Any, other: Any, references: Any) -> None:
    """``⟨P a, b⟩ = ⟨a, P b⟩``: the projector is an orthogonal one."""
    a, b = projector.parts(gradient), projector.parts(other)
    pa = projector.parts(projector(gradient, references))
    pb = projector.parts(projector(other, references))
    for x, y, px, py in zip(a, b, pa, pb, strict=True):
        size = np.linalg.norm(x) * np.linalg.norm(y)
        assert abs(np.sum(px * y) - np.sum(x * py)) <= UNITS * size


def assert_linear(projector: Projector, gradient: Any, other: Any, references: Any) -> None:
    """``P(a + b) = P a + P b``."""
    both = projector(jax.tree.map(jnp.add, gradient, other), references)
    apart = [projector(tree, references) for tree in (gradient, other)]
    pairs = zip(norms(projector, gradient), norms(projector, other), strict=True)
    sizes = [a + b for a, b in pairs]
    total = jax.tree.map(jnp.add, *apart)
    assert_parts_close(projector, both, total, sizes, [UNITS] * len(sizes))


def assert_homogeneous(projector: Projector, gradient: Any, references: Any, factor: float) -> None:
    """``P(c a) = c P(a)`` for positive c."""
    times = partial(jax.tree.map, lambda x: jnp.float32(factor) * x)
    grown = times(gradient)
    first, last = projector(grown, references), times(projector(gradient, references))
    sizes, sure = norms(projector, grown), decided(projector, gradient, references)
    assert_parts_close(projector, first, last, sizes, [UNITS if s else np.inf for s in sure])


def assert_never_longer(projector: Projector, gradient: Any, references: Any) -> None:
    """What is left is no longer than the gradient, in any part."""
    left = norms(projector, projector(gradient, references))
    for before, after in zip(norms(projector, gradient), left, strict=True):
        assert after <= before * (1 + 1e-6)


def assert_invariant_to_reference_scale(
    projector: Projector, gradient: Any, references: Any, rng: np.random.Generator
) -> None:
    """Each reference by a factor of its own, or of another sign; inputs by a common one."""
    signs = [1] if projector.rule == "conflict" else [-1, 1]

    def times(tree: Any, spread: float) -> Any:
        factor = jnp.float32(rng.choice(signs) * 10.0 ** rng.uniform(-spread, spread))
        return jax.tree.map(lambda x: factor * x, tree)

    if projector.of_inputs:
        changed = times(references, 1)
    else:
        changed = [times(tree, 5) for tree in references]
    _assert_same(projector, gradient, references, changed)


def assert_invariant_to_reference_order(
    projector: Projector, gradient: Any, references: Any, rng: np.random.Generator
) -> None:
    """References in any order, and the inputs of a layer likewise."""
    order = rng.permutation(projector.count)
    if projector.of_inputs:
        changed = {name: x[..., order, :] for name, x in references.items()}
    else:
        changed = [references[i] for i in order]
    _assert_same(projector, gradient, references, changed)


def _assert_same(projector: Projector, gradient: Any, references: Any, changed: Any) -> None:
    actual, desired = projector(gradient, changed), projector(gradient, references)
    within = [3 * t for t in tolerances(projector, references)]
    sure = decided(projector, gradient, references)
    within = [t if s else np.inf for t, s in zip(within, sure, strict=True)]
    assert_parts_close(projector, actual, desired, norms(projector, gradient), within)


def stored_bases(projector: Projector, state: Any) -> list[np.ndarray]:
    """The bases of a state in float64, as columns, one for each of its groups."""
    if projector.of_inputs:
        arrays = [np.asarray(state.basis[name], np.float64) for name in state.settings.groups]
        return [u for x in arrays for u in x.reshape(-1, *x.shape[-2:])]
    trees = [vectors(tree, projector.scope, projector.layers) for tree in state.basis]
    return [np.stack(columns, axis=1) for columns in zip(*trees, strict=True)]


def assert_orthonormal_basis(projector: Projector, gradient: Any, references: Any) -> Any:
    """To 1e-6 in as many directions as the state counts; the others are zero."""
    state = projector.state(gradient, references)
    bases = stored_bases(projector, state)
    for basis_NxK, rank in zip(bases, np.asarray(state.rank_used), strict=True):
        present_K = np.linalg.norm(basis_NxK, axis=0) > 0
        assert np.sum(present_K) == rank
        kept_NxR = basis_NxK[:, present_K]
        np.testing.assert_allclose(kept_NxR.T @ kept_NxR, np.eye(rank), atol=1e-6)
    return state
