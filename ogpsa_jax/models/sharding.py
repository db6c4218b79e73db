"""The one table from logical axes of arrays to axes of the device mesh.

Every parameter carries the names of its axes (``("layers", "mlp", "embed")``) as Flax sharding
metadata; :class:`ShardingRules` says which mesh axes each name is split over. An axis with several
names, as in ``("layers", "embed", ("mlp", "embed"))``, is split over what each of them is.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
LogicalAxis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis or axes (``None``: not split).

    The defaults shard parameters fully over ``fsdp`` and, within a layer, over ``tensor`` as in
    Megatron (arXiv 1909.08053); rows of a batch are split over ``data`` and ``fsdp``. ``context``,
    for long rows, splits the tokens of a row, and parameters as ``fsdp`` does. Axes a mesh does not
    have are left out.

    Kernels whose inputs are the hidden dimension are split over their outputs alone: the product of
    an input-side subspace with their gradient, a sum over inputs, then needs no other device.
    """

    # Parameters.
    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = ("fsdp", "context")
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    norm: MeshAxes = None
    lora_rank: MeshAxes = None
    # Activations.
    batch: MeshAxes = ("data", "fsdp")
    exchanged: MeshAxes = "data"  # rows where each device has its part of every row
    length: MeshAxes = "context"
    features: MeshAxes = None
    head_dim: MeshAxes = None

    def spec(
        self, axes: Sequence[LogicalAxis], shape: Sequence[int], mesh: Mesh | AbstractMesh
    ) -> PartitionSpec:
        """The sharding of an array on a mesh.

        A dimension that the mesh axes do not divide is split over as many of the leading ones as
        do, in the end over none. Dimensions of several names come first: what they are split over,
        no other dimension is.

        Args:
          axes: a logical name, several, or None for each dimension.
          shape: the sizes of the dimensions.
          mesh: the mesh.

        Raises:
          ValueError: an unknown logical name, a length mismatch, or two dimensions on one mesh
            axis.
        """
        if len(axes) != len(shape):
            raise ValueError(f"axes must name every dimension of shape {tuple(shape)}, got {axes}")
        parts: list[list[str]] = [[] for _ in axes]
        given: set[str] = set()  # to dimensions of several names
        used: set[str] = set()
        for i in sorted(range(len(axes)), key=lambda i: not isinstance(axes[i], tuple)):
            names = axes[i]
            several = isinstance(names, tuple)
            wanted = [axis for name in as_tuple(names) for axis in self._mesh_axes(name)]
            shards = 1
            for axis in wanted:
                taken = parts[i] if several else given
                if axis not in mesh.shape or axis in taken:
                    continue
                shards *= mesh.shape[axis]
                if shape[i] % shards:
                    break
                parts[i].append(axis)
            if used.intersection(parts[i]):
                raise ValueError(
                    f"rules put two dimensions of {tuple(axes)} on the same mesh axis: {parts[i]}"
                )
            used.update(parts[i])
            given.update(parts[i] if several else ())
        whole = (axes[0] if len(axes) == 1 else tuple(axes) or None for axes in parts)
        return PartitionSpec(*whole)  # type: ignore[no-untyped-call]

    def shards(self, name: str, mesh: Mesh | AbstractMesh) -> int:
        """Into how many parts a mesh splits an axis that has enough elements."""
        return math.prod(mesh.shape.get(axis, 1) for axis in self._mesh_axes(name))

    def _mesh_axes(self, name: str) -> tuple[str, ...]:
        if name not in _LOGICAL_AXES:
            raise ValueError(f"axes must be among {sorted(_LOGICAL_AXES)}, got {name!r}")
        found: MeshAxes = getattr(self, name)
        return as_tuple(found)


def as_tuple(names: MeshAxes) -> tuple[str, ...]:
    """One name or several, or none, as a tuple."""
    return (names,) if isinstance(names, str) else names or ()


_LOGICAL_AXES = frozenset(field.name for field in dataclasses.fields(ShardingRules))


def check_mesh(mesh: Mesh | AbstractMesh | None) -> None:
    """Refuse meshes whose axes the compiler may not shard by itself.

    Raises:
      ValueError: an axis type of the mesh is not ``Auto``.
    """
    if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "mesh must have axis types Auto (jax.make_mesh(..., axis_types=(AxisType.Auto,) * n)), "
            f"got {mesh.axis_types}"
        )


def param_shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Any:
    """The sharding of each parameter.

    Args:
      tree: a model, or a (possibly abstract) ``nnx.State`` of one.
      mesh: the mesh.
      rules: the table.

    Returns:
      The ``nnx.State`` with a ``NamedSharding`` in place of each array; variables without axis
      names are replicated.
    """
    state = tree if isinstance(tree, nnx.State) else nnx.state(tree)

    def place(variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]
        axes = variable.get_metadata().get("out_sharding") or (None,) * len(variable.shape)
        return variable.replace(NamedSharding(mesh, rules.spec(axes, variable.shape, mesh)))

    return jax.tree.map(place, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def constrain(
    array: jax.Array,
    axes: Sequence[LogicalAxis],
    mesh: Mesh | AbstractMesh | None,
    rules: ShardingRules,
) -> jax.Array:
    """Constrain the sharding of an activation; does nothing without a mesh."""
    if mesh is None or mesh.size == 1:
        return array
    sharding = NamedSharding(mesh, rules.spec(axes, array.shape, mesh))
    return jax.lax.with_sharding_constraint(array, sharding)  # type: ignore[no-untyped-call]


class Gathered(NamedTuple):
    """A parameter brought together inside ``shard_map``, to be multiplied with several times.

    Attributes:
      values: the whole, in the dtype of the computation.
      gradient: stands for the parameter where it is differentiated; float32 like `values`, and
        never made. What reaches it is added up on this device, and reduced over devices once.
    """

    values: jax.Array
    gradient: jax.Array


def gather(shard: jax.Array, spec: PartitionSpec, dtype: jnp.dtype) -> Gathered:
    """Bring a parameter together inside ``shard_map``.

    Args:
      shard: this device's part.
      spec: how the parameter is split over the manual axes.
      dtype: of the computation.
    """
    places = [(i, axes) for i, axes in enumerate(spec) if axes]
    whole = jax.lax.stop_gradient(shard).astype(dtype)
    for i, axes in places:
        whole = jax.lax.all_gather(whole, axes, axis=i, tiled=True)

    @jax.custom_vjp
    def stand_in(shard: jax.Array) -> jax.Array:
        return jnp.zeros(whole.shape, jnp.float32)

    def reduce(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        for i, axes in places:
            gradient = jax.lax.psum_scatter(  # type: ignore[no-untyped-call]
                gradient, axes, scatter_dimension=i, tiled=True
            )
        return (gradient.astype(shard.dtype),)

    stand_in.defvjp(lambda shard: (stand_in(shard), None), reduce)
    return Gathered(whole, stand_in(shard))


@jax.custom_vjp
def matmul_gathered(x: jax.Array, kernel: Gathered) -> jax.Array:
    """``x @ kernel``: [..., in], [in, out] -> float32 [..., out]."""
    return _product(x, kernel.values)


def _matmul_forward(x: jax.Array, kernel: Gathered) -> tuple[jax.Array, Any]:
    return matmul_gathered(x, kernel), (x, kernel.values)


def _matmul_backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, Gathered]:
    x, values = saved
    of_x = _product(gradient, values.T)
    flat_x, flat = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return of_x.astype(x.dtype), Gathered(jnp.zeros_like(values), _product(flat_x.T, flat))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """In float32; of float32 factors exactly, which accelerators would round."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == b.dtype == jnp.float32 else None
    return jnp.matmul(a, b, precision=exact, preferred_element_type=jnp.float32)


matmul_gathered.defvjp(_matmul_forward, _matmul_backward)
