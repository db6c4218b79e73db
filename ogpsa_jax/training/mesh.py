"""Devices as a mesh of axes data, fsdp, context and tensor, and how batches lie on it.

Parameters, optimizer state and basis follow the table in :mod:`ogpsa_jax.models.sharding`; rows of
a batch are split over data and fsdp together.
"""

import logging
import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.data.batches import HostBatch
from ogpsa_jax.errors import InputError

logger = logging.getLogger(__name__)
AXES = ("data", "fsdp", "context", "tensor")
ROWS = ("data", "fsdp")


# What launchers set to the number of processes of a job step; JAX finds the rest by itself there.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join_processes() -> None:
    """Make this process one of several, if the environment says that it is.

    ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0), ``JAX_NUM_PROCESSES`` and
    ``JAX_PROCESS_ID`` say it on any machine; under ``srun``, ``mpirun`` and on Cloud TPU pods it is
    found. Must come before anything asks for devices.

    Raises:
      InputError: some of the three variables are missing or no numbers, or the others cannot be
        reached.
    """
    if jax.distributed.is_initialized():
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        if address:
            count, index = (
                int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
            )
            jax.distributed.initialize(address, count, index)
        elif any(int(os.environ.get(name, 1)) > 1 for name in _LAUNCHERS) or (
            "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        ):
            jax.distributed.initialize()
    except KeyError as error:
        raise InputError(
            f"environment: JAX_COORDINATOR_ADDRESS is set, but {error.args[0]} is not; set "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID as well."
        ) from None
    except (ValueError, RuntimeError) as error:
        raise InputError(
            "environment: the processes of this run cannot be joined "
            f"({str(error).splitlines()[0]}); check JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID."
        ) from error


def everywhere(here: bool) -> bool:
    """Whether `here` is true in every process."""
    if jax.process_count() == 1:
        return here
    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


def make_mesh(section: MeshSection) -> Mesh:
    """A mesh over all devices of all processes.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    axes = tuple(axis for axis in AXES if axis != "context" or section.context > 1)
    sizes = [getattr(section, axis) for axis in axes]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // rest, 1)
    if math.prod(sizes) != count:
        raise InputError(
            f"mesh: {' x '.join(axes)} = {' x '.join(map(str, sizes))} does not make the "
            f"{count} devices there are; change mesh, or let one axis be -1."
        )
    return jax.make_mesh(tuple(sizes), axes, axis_types=(AxisType.Auto,) * len(axes))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_per_micro_batch(batch_size: int, micro_batch_size: int, mesh: Mesh) -> int:
    """Rows of one micro-batch over all devices: the largest number that gives equal micro-batches.

    Args:
      batch_size: rows a step.
      micro_batch_size: rows of a device at a time, at most.
      mesh: the devices.

    Raises:
      InputError: the row shards do not divide the batch.
    """
    shards = row_shards(mesh)
    if batch_size % shards:
        raise InputError(
            f"train.batch_size: {batch_size} rows cannot be cut into {shards} row shards "
            f"(mesh.data x mesh.fsdp); make it a multiple of {shards}."
        )
    share = batch_size // shards
    largest = next(size for size in range(min(micro_batch_size, share), 0, -1) if share % size == 0)
    return shards * largest


def check_batch(config: RunConfig, mesh: Mesh) -> None:
    """Refuse a batch that the mesh cannot split, before the run spends time.

    Raises:
      InputError: as :func:`rows_per_micro_batch`.
    """
    in_step_rows, most = config.reference_rows, config.train.micro_batch_size
    for rows in (config.train.batch_size - in_step_rows, in_step_rows):
        if rows:
            share = rows // row_shards(mesh)
            size = rows_per_micro_batch(rows, most, mesh) // row_shards(mesh)
            if size < min(share, most):
                logger.info(
                    "train.micro_batch_size: %d does not divide the %d rows of a device, so its "
                    "micro-batches have %d",
                    *(most, share, size),
                )


def shard_rows(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Put a batch on the devices, rows (axis 1) over data and fsdp.

    Args:
      batch: arrays [micro-batches, rows, ...], whole and the same in every process: token ids are
        small, and which rows a process needs depends on how the mesh lies over the processes.
      mesh: where to.

    Returns:
      The same as global arrays.
    """
    shards = row_shards(mesh)

    def put(array: np.ndarray) -> jax.Array:
        axes: tuple[Any, ...] = (None, ROWS) if array.shape[1] % shards == 0 else ()
        sharding = NamedSharding(mesh, PartitionSpec(*axes))  # type: ignore[no-untyped-call]
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return {name: put(array) for name, array in batch.items()}


def replicate_rest(tree: Any, mesh: Mesh) -> Any:
    """Put arrays that are not on the mesh yet on all of its devices.

    Counters and small matrices of an optimizer state are made on one device. There they would make
    the first compiled step another one than the second, could not be restored beside sharded
    arrays, and would differ from process to process.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]

    def place(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return leaf
        return jax.device_put(np.asarray(leaf), everywhere)

    return jax.tree.map(place, tree)
