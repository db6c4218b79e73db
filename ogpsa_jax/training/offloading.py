"""The optimizer's state in pinned host memory between its uses.

The compiled pieces of training take and return it there. Inside they copy each array to the device
where it is used; the compiler decides when.
"""

from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.errors import InputError

_HOST = "pinned_host"
_LARGE = 2**12  # entries: what is smaller stays on the device


def abstract_state(
    optimizer: optax.GradientTransformation, params: Any, mesh: Mesh, *, offload: bool
) -> Any:
    """Shapes of the optimizer's state, split as ``init`` splits it.

    Traced with explicit axes, arrays say how they are split, as those do that are really there.

    Args:
      optimizer: of the run.
      params: arrays or their shapes, on the mesh.
      mesh: the devices.
      offload: whether large arrays are in host memory.
    """
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )
    with jax.sharding.use_abstract_mesh(explicit):
        state = jax.eval_shape(optimizer.init, _on(params, explicit))
    state = _on(state, mesh)
    return jax.tree.map(in_host_memory, state) if offload else state


def in_host_memory(shape: Any) -> Any:
    """The same shape in pinned host memory; one of few entries as it is."""
    if shape.size < _LARGE:
        return shape
    where = shape.sharding.with_memory_kind(_HOST)
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)  # type: ignore[no-untyped-call]


def fetched(tree: Any, after: Any = ()) -> Any:
    """The tree with everything on the device; inside ``jit``.

    Args:
      tree: arrays here and there.
      after: what must have been computed before anything is copied: the compiler would copy early,
        and the copies would lie beside what the backward pass needs.
    """
    if not any(_on_host(x) for x in jax.tree.leaves(tree)):
        return tree
    if after:
        tree, _ = jax.lax.optimization_barrier((tree, after))  # type: ignore[no-untyped-call]
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x, tree
    )


def put_back(tree: Any, like: Any) -> Any:
    """The tree in the memory in which `like`, a tree of the same structure, was; inside ``jit``."""
    return jax.tree.map(
        lambda x, before: jax.device_put(x, jax.memory.Space.Host) if _on_host(before) else x,
        tree,
        like,
    )


def check_host_memory(mesh: Mesh) -> None:
    """Refuse ``ogpsa.offload`` where the devices cannot reach pinned host memory.

    Raises:
      InputError: so it is.
    """
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if _HOST not in kinds:
        raise InputError(
            f"ogpsa.offload: {device.device_kind} has no pinned host memory, only "
            f"{', '.join(kinds)}; set it to false."
        )


def _on_host(x: Any) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def _on(tree: Any, mesh: Any) -> Any:
    """The same shapes, split in the same way, on this mesh; what is not split is whole."""

    def place(leaf: Any) -> Any:
        spec = getattr(leaf.sharding, "spec", PartitionSpec())  # type: ignore[no-untyped-call]
        where = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # type: ignore[no-untyped-call]

    return jax.tree.map(place, tree)
