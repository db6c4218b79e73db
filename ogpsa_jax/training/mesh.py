"""Devices as a mesh of axes data, fsdp, context and tensor, and how batches lie on it.

Parameters, optimizer state and basis follow the table in :mod:`ogpsa_jax.models.sharding`; rows of
a batch are split over data and fsdp together.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.data.batches import HostBatch
from ogpsa_jax.errors import InputError

logger = logging.getLogger(__name__)
AXES = ("data", "fsdp", "context", "tensor")  # from the least to the most traffic
ROWS = ("data", "fsdp")
_MOST_MULTIPLES = 1000  # of the row shards that are tried as a batch size
_MOST_TENSOR = 8  # devices that share a row in advice: those of one host


def make_mesh(
    section: MeshSection,
    devices: Sequence[jax.Device] | None = None,
    slices: int = 1,
) -> Mesh:
    """A mesh whose axes lie on the network as it is.

    The fast network inside a slice carries fsdp, context and tensor; ``dcn_data`` replicas lie on
    different slices. A physical axis of a TPU slice is split between axes where it has to be.

    Args:
      section: the sizes.
      devices: real or described ones; by default all of all processes.
      slices: how many there are, where described devices do not tell it themselves.

    Raises:
      InputError: the sizes do not make the devices, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    members = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(set(members.values())) > 1:
        raise InputError(f"mesh: the slices have unequal numbers of devices: {dict(members)}.")
    slices = max(slices, len(members))
    axes = tuple(axis for axis in AXES if axis != "context" or section.context > 1)
    replicas, sizes = _sizes(section, axes, len(devices), slices)
    spanned = slices // replicas  # slices that the shards of a replica lie on
    if sizes[1] % spanned:
        raise InputError(
            f"mesh.dcn_data: with {replicas} replicas over {slices} slices, the shards of each lie "
            f"on {spanned} slices, but mesh.fsdp = {sizes[1]} is not a multiple of {spanned}; set "
            f"mesh.dcn_data to {slices}, or mesh.fsdp to a multiple of {spanned}."
        )
    whole = (replicas * sizes[0], *sizes[1:])
    if len(members) == 1:
        laid = mesh_utils.create_device_mesh(whole, devices, allow_split_physical_axes=True)
    else:
        laid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0], sizes[1] // spanned, *sizes[2:]),
            (replicas, spanned, *(1 for _ in sizes[2:])),
            devices,
            allow_split_physical_axes=True,
        )
    return Mesh(laid, axes, axis_types=(AxisType.Auto,) * len(axes))


def _sizes(
    section: MeshSection, axes: Sequence[str], count: int, slices: int
) -> tuple[int, list[int]]:
    """Replicas across slices, and the sizes of the axes beside them."""
    replicas = slices if section.dcn_data == -1 else section.dcn_data
    if slices % replicas:
        fitting = ", ".join(str(n) for n in range(1, slices + 1) if slices % n == 0)
        raise InputError(
            f"mesh.dcn_data: {replicas} does not divide the number of slices, {slices}; set it to "
            f"-1 or one of {fitting}. Replicas inside a slice are mesh.data."
        )
    sizes = [getattr(section, axis) for axis in axes]
    if -1 in sizes:
        rest = replicas * math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // rest, 1)
    if replicas * math.prod(sizes) != count:
        names, shown = [*axes], sizes
        if replicas > 1:
            names, shown = ["dcn_data", *names], [replicas, *sizes]
        raise InputError(
            f"mesh: {' x '.join(names)} = {' x '.join(map(str, shown))} does not make the {count} "
            "devices there are; change mesh, or let one axis be -1."
        )
    return replicas, sizes


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
      InputError: it names the smallest values of the run's keys that work.
    """
    shards, most = row_shards(mesh), config.train.micro_batch_size
    if not _splits(config, shards):
        raise InputError(_uneven(config, mesh))
    for rows in _rows(config):
        share = rows // shards
        size = rows_per_micro_batch(rows, most, mesh) // shards if rows else 0
        if size < min(share, most):
            logger.info(
                "train.micro_batch_size: %d does not divide the %d rows of a device, so its "
                "micro-batches have %d",
                *(most, share, size),
            )


def _rows(config: RunConfig) -> tuple[int, int]:
    """Rows of a step that are data, and that are references."""
    references = config.reference_rows
    return config.train.batch_size - references, references


def _splits(config: RunConfig, shards: int) -> bool:
    rows, references = _rows(config)
    return rows > 0 and rows % shards == 0 and references % shards == 0


def _uneven(config: RunConfig, mesh: Mesh) -> str:
    """One sentence for a batch that the row shards do not divide: what it is, and what works."""
    batch, shards = config.train.batch_size, row_shards(mesh)
    data, references = _rows(config)
    share = config.references.in_step.share if config.references.in_step else 0.0
    found = f"train.batch_size: {batch} rows"
    if references:
        found += (
            f" ({data} of the data and, with references.in_step.share = {share:g}, {references} "
            "of the references)"
        )
    sizes = " x ".join(str(mesh.shape[axis]) for axis in ROWS)
    remedies = []
    larger = (-(-batch // shards) + n for n in range(_MOST_MULTIPLES))
    works = (n * shards for n in larger if _splits(_with_batch(config, n * shards), shards))
    if (size := next(works, None)) is not None:
        remedies.append(f"train.batch_size={size}")
    elif references:
        remedies.append(f"train.batch_size={2 * shards} references.in_step.share=0.5")
    fewer = math.gcd(data, references, shards)
    tensor = mesh.shape["tensor"] * shards // fewer
    if tensor <= _MOST_TENSOR and fewer % mesh.shape["data"] == 0:
        fsdp = fewer // mesh.shape["data"]
        remedies.append(f"mesh.tensor={tensor} mesh.fsdp={fsdp} for {fewer} row shards")
    return (
        f"{found} cannot be cut evenly into mesh.data x mesh.fsdp = {sizes} = {shards} row shards; "
        f"set {', or '.join(remedies)}."
    )


def _with_batch(config: RunConfig, size: int) -> RunConfig:
    train = config.train.model_copy(update={"batch_size": size})
    return config.model_copy(update={"train": train})


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
