r"""Subspaces of the inputs of layers: a basis of r columns where a gradient basis needs matrices.

For a matrix W ``[in, out]`` the reference subspace is all ``U A`` with U ``[in, r]`` orthonormal,
and the projection ``g ← g − U M (Uᵀ g)``, ``M = (Uᵀ U)⁻¹`` of U as stored. A step that has lost it
changes no output ``xᵀ W`` for an input x in the span of U. U holds the leading eigenvectors of the
second moment of the reference inputs, as many as make up the share `energy` of it, at most `rank`.
Columns beyond are zero: shapes never depend on data.

Source: GPM (arXiv 2103.09762), there for whole tasks and plain SGD.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ogpsa_jax.projection.groups import is_masked, key_names
from ogpsa_jax.projection.kernels import KernelLeaf, Kernels, find_kernels
from ogpsa_jax.projection.meshes import let_compiler_place
from ogpsa_jax.projection.second_moments import Moments, SecondMoment
from ogpsa_jax.projection.serialization import serialisable
from ogpsa_jax.projection.state import OgpsaState
from ogpsa_jax.projection.subspace import eigen, inverse_root, multiply

Others = Literal["freeze", "gradients", "leave"]
_HIGHEST = jax.lax.Precision.HIGHEST
_TINY = 2.0**-112


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


class NoKernels(InputSettings):
    """Settings over a tree without leaves: equal to any settings (see ``state.NoLeaves``)."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InputSettings)

    def __hash__(self) -> int:
        return 0


@serialisable
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputState:
    """State of :func:`ogpsa_jax.ogpsa_project` with ``subspace="inputs"``.

    r is the rank, or the size of the input where that is smaller; G counts inputs, every layer for
    one.
    """

    basis: dict[str, jax.Array]  # U [..., in, r] by input, layers in front
    metric: dict[str, jax.Array]  # float32 [..., r, r]: (UᵀU)⁻¹ of U as stored, zero where absent
    energy_held: jax.Array  # float32 [G]: share of the second moment that U spans, at least
    rank_used: jax.Array  # int32 [G]: columns that are present
    squared_norm: jax.Array  # float32 [G]: of the last gradient, before the rule
    in_span: jax.Array  # float32 [G]: of its component in the subspace
    removed: jax.Array  # float32 [G]: what the rule took of its squared norm
    steps_since_refresh: jax.Array  # int32 []: updates since the basis last changed
    refreshes: jax.Array  # int32 []: refreshes accepted
    refused_refreshes: jax.Array  # int32 []: refreshes refused, the moments not being finite
    projected_moments: jax.Array  # int32 []: first moments that the last refresh projected
    others: OgpsaState | None  # of the leaves that are no matrices, where they have a gradient span
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
        size = min(rank, kernel.width)
        shape = (*kernel.layers, kernel.width, size)
        basis[name] = _zeros_beside(leaf, kernel, shape, dtype or leaf.dtype)
        metric[name] = jnp.zeros((*kernel.layers, size, size), jnp.float32)
    groups = sum(rows.stop - rows.start for rows in settings.rows().values())

    def per_group(dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(groups, dtype)

    return InputState(
        basis=basis,
        metric=metric,
        energy_held=per_group(),
        rank_used=per_group(jnp.int32),
        squared_norm=per_group(),
        in_span=per_group(),
        removed=per_group(),
        steps_since_refresh=jnp.zeros([], jnp.int32),
        refreshes=jnp.zeros([], jnp.int32),
        refused_refreshes=jnp.zeros([], jnp.int32),
        projected_moments=jnp.zeros([], jnp.int32),
        others=others,
        settings=settings,
    )


def kernel_names(params: Any, kernels: Kernels) -> set[str]:
    """The paths of the leaves that are matrices."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {kernel.name for kernel in find_kernels(flat, kernels)} if flat else set()


def _zeros_beside(leaf: Any, kernel: KernelLeaf, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Zeros ``[..., in, r]`` on the devices of a kernel, split as its layers and inputs are.

    Only where its sharding can be seen: not of a traced array with automatic axes.
    """
    sharding = getattr(leaf, "sharding", None) or getattr(jax.typeof(leaf), "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return jnp.zeros(shape, dtype)
    spec = [*sharding.spec, *[None] * (len(kernel.shape) - len(sharding.spec))]
    inputs = spec[kernel.axes[0]] if len(kernel.axes) == 1 else None
    parts = (*(spec[i] for i in kernel.stacked), inputs, None)
    placed = jax.sharding.PartitionSpec(*parts)  # type: ignore[no-untyped-call]
    if isinstance(sharding.mesh, jax.sharding.AbstractMesh):  # traced, with explicit axes
        return jnp.zeros(
            shape, dtype, out_sharding=jax.sharding.NamedSharding(sharding.mesh, placed)
        )
    where = jax.sharding.NamedSharding(sharding.mesh, placed, memory_kind=sharding.memory_kind)
    return jnp.zeros(shape, dtype, device=where)


def refresh_inputs(state: InputState, moments: Moments) -> InputState:
    """A state whose subspaces are made from `moments`. Jittable.

    Moments that are not finite, in any layer, change nothing and are counted.

    Raises:
      ValueError: moments that are missing, no :class:`SecondMoment`, or of another shape than the
        kernels' inputs.
    """
    settings = state.settings
    if not settings.kernels:
        return state
    _check_moments(settings, moments)
    accept = jnp.array(True)
    for name in settings.groups:
        moment = moments[name]
        finite = jnp.isfinite(jnp.sum(jnp.abs(moment.product))) & jnp.all(
            jnp.isfinite(moment.trace)
        )
        accept = accept & finite
    basis, metric, held, ranks = {}, {}, [], []
    for name in settings.groups:
        old = state.basis[name]
        make = partial(_subspaces, shape=old.shape, dtype=old.dtype, settings=settings)
        like = (old, None, None, None)
        new, inverse, share, rank = let_compiler_place(make, like, moments[name])
        basis[name] = jnp.where(accept, new, old)
        metric[name] = jnp.where(accept, inverse, state.metric[name])
        held.append(share)
        ranks.append(rank)
    return replace(
        state,
        basis=basis,
        metric=metric,
        energy_held=jnp.where(accept, jnp.concatenate(held), state.energy_held),
        rank_used=jnp.where(accept, jnp.concatenate(ranks), state.rank_used),
        steps_since_refresh=jnp.where(accept, 0, state.steps_since_refresh),
        refreshes=state.refreshes + accept.astype(jnp.int32),
        refused_refreshes=state.refused_refreshes + (~accept).astype(jnp.int32),
        projected_moments=jnp.zeros([], jnp.int32),
    )


def _check_moments(settings: InputSettings, moments: Moments) -> None:
    if not isinstance(moments, Mapping):
        raise ValueError(f"moments: expected a dict by input, got {type(moments).__name__}")
    for name, kernels in settings.groups.items():
        kernel = kernels[0]
        if name not in moments:
            raise ValueError(
                f"moments: those of {name!r}, which {kernel.name} multiplies, are missing; there "
                f"are {', '.join(map(repr, moments)) or 'none'}"
            )
        if not isinstance(moments[name], SecondMoment):
            raise ValueError(
                f"moments: that of {name!r} is a {type(moments[name]).__name__}; make it with "
                "second_moment(inputs), or collect all with input_moments"
            )
        product, trace = moments[name].product, moments[name].trace
        wanted = (*kernel.layers, kernel.width)
        if product.shape[:-1] != wanted or trace.shape != kernel.layers:
            raise ValueError(
                f"moments: those of {name!r} have shape {product.shape}, but {kernel.name} of "
                f"shape {kernel.shape} calls for {(*wanted, kernel.width)} (a sketch: fewer)"
            )
        if moments[name].seed is None and product.shape[-1] != kernel.width:
            raise ValueError(
                f"moments: those of {name!r} have {product.shape[-1]} columns of {kernel.width} "
                "and no seed, so they are neither whole nor a sketch"
            )


def _subspaces(
    moment: SecondMoment, *, shape: tuple[int, ...], dtype: Any, settings: InputSettings
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As :func:`_subspace` for every layer; the two last are float32 and int32 ``[G]``."""
    *layers, _, size = shape
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(layers) :]), moment)
    # Layer by layer: the eigenvectors of one are all that exists at a time.
    one = partial(_subspace, size=size, settings=settings, dtype=dtype)
    basis, inverse, share, rank = jax.lax.map(one, flat)
    return basis.reshape(shape), inverse.reshape(*layers, size, size), share, rank


def _subspace(
    moment: SecondMoment, size: int, settings: InputSettings, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """U ``[in, r]``, ``(UᵀU)⁻¹``, the share it holds, and its rank, of one layer's moment."""
    usable = jnp.isfinite(moment.trace) & (moment.trace > _TINY)
    scale = jnp.where(usable, 1.0 / jnp.where(usable, moment.trace, 1.0), 0.0)
    product = jnp.where(usable, moment.product * scale, 0.0)  # of trace one
    values, vectors = _eigenpairs(replace(moment, product=product), size)
    # As many as reach the share; the one that crosses the line is in.
    before = jnp.cumsum(values) - values
    keep = (before < settings.energy) & (values > settings.rank_tol * values[0]) & (values > 0)
    kept = jnp.where(keep[None, :], vectors, 0.0)
    turn = inverse_root(multiply(kept.T, kept)[None])[0]
    basis_IxR = multiply(kept, turn).astype(dtype)
    stored = basis_IxR.astype(jnp.float32)
    gram_RxR = multiply(stored.T, stored)
    present = jnp.diagonal(gram_RxR) > 0.25
    share = jnp.sum(jnp.where(present, values, 0.0))
    rank = jnp.sum(present, dtype=jnp.int32)
    return basis_IxR, _inverse(gram_RxR, present), share, rank


def _eigenpairs(moment: SecondMoment, size: int) -> tuple[jax.Array, jax.Array]:
    """The leading eigenvalues, largest first, and eigenvectors ``[in, size]`` of one moment."""
    if moment.seed is None:
        values, vectors = eigen(moment.product[None])
        return values[0, :size], vectors[0, :, :size]
    # Nyström: A ≈ Y (Ωᵀ Y)⁺ Yᵀ = B Bᵀ, whose left singular vectors are wanted.
    omega_IxS, sketch_IxS = moment.test_matrix(), moment.product
    core = multiply(omega_IxS.T, sketch_IxS)
    lengths, turn = eigen(0.5 * (core + core.T)[None])
    # Y is known to float32's precision, and so is the core.
    safe = lengths[0] > 1e-6 * lengths[0, 0]
    root = jnp.where(safe, jax.lax.rsqrt(jnp.where(safe, lengths[0], 1.0)), 0.0)
    half_IxS = multiply(sketch_IxS, turn[0] * root[None, :])
    values, right = eigen(multiply(half_IxS.T, half_IxS)[None])
    values = jnp.maximum(values[0], 0.0)
    inverse = jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1.0)), 0.0)
    vectors = multiply(half_IxS, right[0] * inverse[None, :])
    missing = max(size - values.shape[0], 0)
    return (
        jnp.pad(values, (0, missing))[:size],
        jnp.pad(vectors, ((0, 0), (0, missing)))[:, :size],
    )


def _inverse(gram: jax.Array, present: jax.Array) -> jax.Array:
    """Inverse of a nearly unit Gram matrix ``[r, r]``, zero where a column is absent.

    Newton–Schulz: the error of the start, below .1 for a basis kept in bfloat16, is squared each
    time.
    """
    both = present[:, None] & present[None, :]
    identity = jnp.eye(gram.shape[0], dtype=jnp.float32)
    filled = jnp.where(both, gram, identity)

    def improve(_: int, inverse: jax.Array) -> jax.Array:
        return multiply(inverse, 2.0 * identity - multiply(filled, inverse))

    return jnp.where(both, jax.lax.fori_loop(0, 6, improve, identity), 0.0)


def project_inputs(
    leaves: Sequence[Any], state: InputState, *, freeze: bool = True
) -> tuple[list[Any], jax.Array]:
    """Apply the state's rule to the leaves of a gradient, an update or a moment.

    Args:
      leaves: all leaves of the tree, those that are masked included; kernels that are masked stay
        as they are.
      state: the subspaces.
      freeze: also zero the leaves that are frozen.

    Returns:
      The leaves after the rule, in their own dtypes, and float32 ``[3, G]``: the squared norms
      before the rule, in the span, and removed.
    """
    settings, out = state.settings, list(leaves)
    energies: list[jax.Array] = []
    for name, group in settings.groups.items():
        count = math.prod(group[0].layers)
        there = [kernel for kernel in group if not is_masked(leaves[kernel.leaf])]
        if not there:
            energies.append(jnp.zeros((3, count), jnp.float32))
            continue
        own = [leaves[kernel.leaf] for kernel in there]
        project = partial(_project_group, kernels=there, rule=settings.rule)
        projected, found = let_compiler_place(
            project, (own, None), own, state.basis[name], state.metric[name]
        )
        for kernel, leaf in zip(there, projected, strict=True):
            out[kernel.leaf] = leaf
        energies.append(found.reshape(count, 3).T)
    if freeze:
        for place in settings.frozen:
            if not is_masked(out[place]):
                out[place] = jnp.zeros_like(out[place])
    return out, jnp.concatenate(energies, axis=1)


def _project_group(
    leaves: Sequence[jax.Array],
    basis: jax.Array,
    metric: jax.Array,
    *,
    kernels: Sequence[KernelLeaf],
    rule: str,
) -> tuple[list[jax.Array], jax.Array]:
    """Kernels that share inputs, so that each layer's U is gathered once, and for that layer only.

    Returns the leaves and float32 ``[..., 3]``: the squared norms before, in the span, and removed.
    """
    if kernels[0].stacked:
        moved = [jnp.moveaxis(x, k.stacked[0], 0) for x, k in zip(leaves, kernels, strict=True)]
        rest = [_without(kernel, kernel.stacked[0]) for kernel in kernels]

        def layer(one: tuple[Any, ...]) -> tuple[list[jax.Array], jax.Array]:
            return _project_group(*one, kernels=rest, rule=rule)

        out, energies = jax.lax.map(layer, (moved, basis, metric))
        back = [jnp.moveaxis(x, 0, k.stacked[0]) for x, k in zip(out, kernels, strict=True)]
        return back, energies
    out, energies = [], jnp.zeros(3, jnp.float32)
    for leaf, kernel in zip(leaves, kernels, strict=True):
        result, found = _project_one(leaf, kernel, basis, metric, rule)
        out.append(result)
        energies = energies + found
    return out, energies


def _project_one(
    leaf: jax.Array, kernel: KernelLeaf, basis: jax.Array, metric: jax.Array, rule: str
) -> tuple[jax.Array, jax.Array]:
    # The input axes stay as they are, for they may be sharded: U takes their shape instead.
    sizes = tuple(leaf.shape[i] for i in kernel.axes)
    wide = leaf.dtype if leaf.dtype == basis.dtype else jnp.dtype(jnp.float32)
    u = basis.reshape(*sizes, -1).astype(wide)
    over = tuple(range(len(sizes)))
    coefficients = jax.lax.dot_general(  # [r, out...]
        u,
        leaf.astype(wide),
        ((over, kernel.axes), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    # An infinite gradient times a zero column is not a number: absent columns have no weight.
    present = (jnp.diagonal(metric) > 0).reshape(-1, *[1] * (coefficients.ndim - 1))
    coefficients = jnp.where(present, coefficients, 0.0)
    weights = jax.lax.dot_general(
        metric, coefficients, (((1,), (0,)), ((), ())), precision=_HIGHEST
    )
    before = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
    in_span = jnp.sum(coefficients * weights)
    if rule == "none":
        return leaf, jnp.stack([before, in_span, jnp.zeros_like(before)])
    component = jax.lax.dot_general(  # [in..., out...]
        u.astype(jnp.float32),
        weights,
        (((len(sizes),), (0,)), ((), ())),
        precision=_HIGHEST,
        preferred_element_type=jnp.float32,
    )
    component = jnp.transpose(component, _order(kernel))
    keep_component = rule == "inplane"
    result = component if keep_component else leaf.astype(jnp.float32) - component
    removed = jnp.maximum(before - in_span, 0.0) if keep_component else in_span
    return result.astype(leaf.dtype), jnp.stack([before, in_span, removed])


def _order(kernel: KernelLeaf) -> tuple[int, ...]:
    """The permutation from (inputs, outputs) back to a leaf's own axes."""
    axes = (*kernel.axes, *kernel.outputs)
    return tuple(axes.index(i) for i in range(len(axes)))


def _without(kernel: KernelLeaf, axis: int) -> KernelLeaf:
    """The kernel of one layer: `axis` is gone."""

    def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - (i > axis) for i in axes if i != axis)

    return kernel._replace(
        shape=kernel.shape[:axis] + kernel.shape[axis + 1 :],
        stacked=shifted(kernel.stacked),
        axes=shifted(kernel.axes),
        outputs=shifted(kernel.outputs),
    )


def apply_inputs(updates: Any, state: InputState) -> tuple[Any, InputState]:
    """Apply the state's rule to `updates` (without what `others` holds)."""
    if not state.settings.kernels:
        return updates, state
    leaves, treedef = flatten_like(state.settings, updates, "updates")
    out, (squared_norm, in_span, removed) = project_inputs(leaves, state)
    new_state = replace(
        state,
        squared_norm=squared_norm,
        in_span=in_span,
        removed=removed,
        steps_since_refresh=optax.safe_increment(state.steps_since_refresh),
    )
    return treedef.unflatten(out), new_state


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
