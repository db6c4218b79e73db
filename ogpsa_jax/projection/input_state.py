"""The state of a projection off the inputs of layers, and how it is made from parameters."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ogpsa_jax.projection.groups import Scope, is_masked, key_names
from ogpsa_jax.projection.kernels import KernelLeaf, Kernels, find_kernels
from ogpsa_jax.projection.serialization import serialisable
from ogpsa_jax.projection.state import (
    OgpsaState,
    Placeholder,
    ProjectionState,
    init_span,
    no_figures,
)

Others = Literal["freeze", "gradients", "leave"]


@dataclass(frozen=True)
class InputSettings:
    """Hashable settings of one transformation: static in the tree structure of its state."""

    rank: int
    energy: float
    rule: str
    rank_tol: float
    kernels: tuple[KernelLeaf, ...]
    frozen: tuple[int, ...]  # places of the leaves whose updates are zero
    paths: tuple[tuple[str, ...], ...]  # of all leaves, those that are masked included

    @property
    def groups(self) -> dict[str, tuple[KernelLeaf, ...]]:
        """The kernels by the name of their input, in the order of the state's rows."""
        names = dict.fromkeys(kernel.inputs for kernel in self.kernels)
        return {name: tuple(k for k in self.kernels if k.inputs == name) for name in names}

    def rows(self) -> dict[str, slice]:
        """The rows of each input in per-group arrays, one for every layer."""
        rows, start = {}, 0
        for name, kernels in self.groups.items():
            stop = start + math.prod(kernels[0].layers)
            rows[name], start = slice(start, stop), stop
        return rows


class NoKernels(Placeholder, InputSettings):
    """Equal to any :class:`InputSettings`."""


@serialisable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputState(ProjectionState):
    """State of :func:`ogpsa_jax.ogpsa_project` with ``subspace="inputs"``.

    r is the rank, or the size of the input where that is smaller; G counts inputs, every layer for
    one.
    """

    basis: dict[str, jax.Array]  # U [..., in, r] by input, layers in front
    # (UᵀU)⁻¹ of U as stored, float32 [..., r, r], zero where a column is absent. A U in float32 is
    # orthonormal to round-off: of it the diagonal [..., r] alone, ones and zeros.
    metric: dict[str, jax.Array]
    energy_held: jax.Array  # float32 [G]: share of the second moment that U spans, at least
    others: OgpsaState | None  # of leaves that are not kernels, if they have a gradient subspace
    settings: InputSettings = field(metadata={"static": True})


def init_inputs(
    params: Any,
    *,
    rank: int,
    energy: float,
    rule: str,
    rank_tol: float,
    kernels: Kernels,
    freeze: bool,
    others: OgpsaState | None,
    dtype: Any,
) -> InputState:
    """A state without a subspace: the identity on kernels."""
    paths_and_leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_masked)[0]
    empty = all(is_masked(leaf) for _, leaf in paths_and_leaves)
    found = () if empty else find_kernels(paths_and_leaves, kernels)
    places = {kernel.leaf for kernel in found}
    frozen = [
        place
        for place, (_, leaf) in enumerate(paths_and_leaves)
        if freeze and place not in places and not is_masked(leaf)
    ]
    kind = NoKernels if empty else InputSettings
    paths = tuple(key_names(path) for path, _ in paths_and_leaves)
    settings = kind(rank, energy, rule, rank_tol, found, tuple(frozen), paths)
    basis, metric = {}, {}
    for name, group in settings.groups.items():
        kernel, leaf = group[0], paths_and_leaves[group[0].leaf][1]
        size, of = min(rank, kernel.width), jnp.dtype(dtype or leaf.dtype)
        zeros = partial(_zeros_beside, leaf, kernel)
        own = _input_axes(leaf, kernel)
        # What splits all of them: more would split their updates otherwise than they are.
        splits = [_mesh_axes(paths_and_leaves[k.leaf][1]) for k in group]
        rest = tuple(a for a in splits[0] if a not in own and all(a in s for s in splits))
        basis[name] = zeros((*own, *rest), (*kernel.layers, kernel.width, size), of)
        metric[name] = (
            # Not over the input's axes: the compiler would then split what meets U by columns.
            zeros(rest, (*kernel.layers, size, size), jnp.float32)
            if needs_metric(of)
            else jnp.zeros((*kernel.layers, size), jnp.float32)
        )
    groups = sum(rows.stop - rows.start for rows in settings.rows().values())
    return InputState(
        basis=basis,
        metric=metric,
        energy_held=jnp.zeros(groups, jnp.float32),
        **no_figures(groups),
        others=others,
        settings=settings,
    )


def needs_metric(dtype: Any) -> bool:
    """Whether columns that were orthonormal in float32 are so no longer in this type."""
    return jnp.dtype(dtype).itemsize < 4


def init_others(
    params: Any, rank: int, scope: Scope, kernels: Kernels, **settings: Any
) -> OgpsaState | None:
    """The gradient span of the leaves that are no matrices; None where all are."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {kernel.name for kernel in find_kernels(flat, kernels)} if flat else set()

    def outside(path: Any, leaf: Any) -> str | None:
        name = jax.tree_util.keystr(path)
        if name in names:
            return None
        return scope(path, leaf) if callable(scope) else "all" if scope == "global" else name

    return init_span(params, rank, outside, **settings) if len(names) < len(flat) else None


def _sharding(leaf: Any) -> jax.sharding.NamedSharding | None:
    """Where it can be seen: not of a traced array with automatic axes."""
    sharding = getattr(leaf, "sharding", None) or getattr(jax.typeof(leaf), "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _split(sharding: jax.sharding.NamedSharding) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension."""
    return [(p,) if isinstance(p, str) else tuple(p or ()) for p in sharding.spec]


def _mesh_axes(leaf: Any) -> tuple[str, ...]:
    """The mesh axes over which a leaf is split."""
    sharding = _sharding(leaf)
    return () if sharding is None else tuple(axis for axes in _split(sharding) for axis in axes)


def _dimensions(leaf: Any, kernel: KernelLeaf) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension of a kernel."""
    sharding = _sharding(leaf)
    found = [] if sharding is None else _split(sharding)
    return [*found, *[()] * (len(kernel.shape) - len(found))]


def _input_axes(leaf: Any, kernel: KernelLeaf) -> tuple[str, ...]:
    """The mesh axes over which a kernel's input is split; none where several axes make it up."""
    return _dimensions(leaf, kernel)[kernel.axes[0]] if len(kernel.axes) == 1 else ()


def _zeros_beside(
    leaf: Any, kernel: KernelLeaf, over: tuple[str, ...], shape: tuple[int, ...], dtype: Any
) -> jax.Array:
    """Zeros ``[..., rows, r]`` on the devices of a kernel, layers split as its layers are.

    Rows are split over the mesh axes `over`, as far as these divide them.
    """
    sharding = _sharding(leaf)
    if sharding is None:
        return jnp.zeros(shape, dtype)
    dimensions = _dimensions(leaf, kernel)
    layers = [dimensions[i] for i in kernel.stacked]
    taken = {axis for axes in layers for axis in axes}
    rows: list[str] = []
    for axis in over:
        if axis in taken:
            continue
        if shape[-2] % math.prod(sharding.mesh.shape[a] for a in (*rows, axis)) == 0:
            rows.append(axis)
    parts = (*(axes or None for axes in layers), tuple(rows) or None, None)
    placed = jax.sharding.PartitionSpec(*parts)  # type: ignore[no-untyped-call]
    if isinstance(sharding.mesh, jax.sharding.AbstractMesh):  # traced, with explicit axes
        return jnp.zeros(
            shape, dtype, out_sharding=jax.sharding.NamedSharding(sharding.mesh, placed)
        )
    where = jax.sharding.NamedSharding(sharding.mesh, placed, memory_kind=sharding.memory_kind)
    return jnp.zeros(shape, dtype, device=where)


def flatten_like(settings: InputSettings, tree: Any, what: str) -> tuple[list[Any], Any]:
    """Leaves (masked ones included) and structure of a tree like the parameters.

    Raises:
      ValueError: it has other leaves than they do.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_masked)
    if len(leaves) != len(settings.paths):
        raise ValueError(
            f"{what}: expected a tree shaped like the parameters ({len(settings.paths)} leaves), "
            f"got {len(leaves)} leaves"
        )
    for kernel in settings.kernels:
        leaf = leaves[kernel.leaf]
        if not is_masked(leaf) and jnp.shape(leaf) != kernel.shape:
            raise ValueError(
                f"{what}: a leaf of shape {jnp.shape(leaf)} where the parameters have "
                f"{kernel.shape} ({kernel.name})"
            )
    return leaves, treedef
