"""The one table from logical axes of arrays to axes of the device mesh.

Every parameter carries the names of its axes (``("layers", "mlp", "embed")``) as Flax sharding
metadata; :class:`ShardingRules` says which mesh axes each name is split over. An axis with several
names, as in ``("layers", "embed", ("mlp", "embed"))``, is split over what each of them is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MeshAxes = str | tuple[str, ...] | None
LogicalAxis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis or axes (``None``: not split).

    The defaults shard parameters fully over ``fsdp`` and, within a layer, over ``tensor`` as in
    Megatron (arXiv 1909.08053); rows of a batch are split over ``data`` and ``fsdp``. Axes a mesh
    does not have are left out.

    Kernels whose inputs are the hidden dimension are split over their outputs alone: the product of
    an input-side subspace with their gradient, a sum over inputs, then needs no other device.
    """

    # Parameters.
    layers: MeshAxes = None
    vocab: MeshAxes = "tensor"
    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    norm: MeshAxes = None
    lora_rank: MeshAxes = None
    # Activations.
    batch: MeshAxes = ("data", "fsdp")
    length: MeshAxes = None
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
            wanted = [axis for name in _several(names) for axis in self._mesh_axes(name)]
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

    def _mesh_axes(self, name: str) -> tuple[str, ...]:
        if name not in _LOGICAL_AXES:
            raise ValueError(f"axes must be among {sorted(_LOGICAL_AXES)}, got {name!r}")
        found: MeshAxes = getattr(self, name)
        return _several(found)


def _several(names: MeshAxes) -> tuple[str, ...]:
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
