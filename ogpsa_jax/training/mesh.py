"""Devices as a mesh of axes data, fsdp and tensor, and how batches lie on it.

Parameters, optimizer state and basis follow the table in :mod:`ogpsa_jax.models.sharding`; rows of
a batch are split over data and fsdp together.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.errors import InputError
from ogpsa_jax.training.config import MeshSection

ROWS = ("data", "fsdp")


def make_mesh(section: MeshSection) -> Mesh:
    """A mesh over all devices of all processes.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = [section.data, section.fsdp, section.tensor]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // rest, 1)
    if math.prod(sizes) != count:
        raise InputError(
            f"mesh: data x fsdp x tensor = {sizes[0]} x {sizes[1]} x {sizes[2]} does not make the "
            f"{count} devices there are; change mesh, or let one axis be -1."
        )
    return jax.make_mesh(tuple(sizes), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_per_micro_batch(batch_size: int, micro_batch_size: int, mesh: Mesh) -> int:
    """Rows of one micro-batch over all devices.

    Args:
      batch_size: rows a step.
      micro_batch_size: rows a device holds at a time, at most.
      mesh: the devices.

    Raises:
      InputError: the batch cannot be cut evenly.
    """
    shards = row_shards(mesh)
    rows = min(batch_size, micro_batch_size * shards)
    if batch_size % rows or rows % shards:
        raise InputError(
            f"train.batch_size: {batch_size} rows cannot be cut into micro-batches for {shards} "
            f"row shards of at most train.micro_batch_size ({micro_batch_size}) rows; make it a "
            f"multiple of {micro_batch_size * shards}."
        )
    return rows


def shard_rows(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's part of a batch on the devices, rows (axis 1) over data and fsdp.

    Args:
      batch: arrays [micro-batches, rows of this process, ...].
      mesh: where to.

    Returns:
      Global arrays [micro-batches, rows, ...].
    """
    shards = row_shards(mesh)

    def put(array: np.ndarray) -> jax.Array:
        rows = array.shape[1] * jax.process_count()
        axes: tuple[Any, ...] = (None, ROWS) if rows % shards == 0 else ()
        sharding = NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]
        return jax.make_array_from_process_local_data(sharding, array)  # type: ignore[no-untyped-call]

    return {name: put(array) for name, array in batch.items()}
