"""Devices that need not be here: what they can do, and meshes of them for the compiler.

Figures are those that the makers publish, for dense bfloat16: Google's Cloud TPU pages "TPU v4",
"TPU v5e", "TPU v5p" and "TPU v6e"; NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and
B200. Network is what one device sends and receives in all to its neighbours.
"""

import importlib.util
import math
import os
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.training.mesh import make_mesh

_MOST = 100_000  # devices


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
      name: as in ``--on``.
      memory: bytes.
      flops: bfloat16 operations a second.
      memory_bandwidth: bytes a second.
      network_bandwidth: bytes a second, to all neighbours in the slice or the machine.
    """

    name: str
    memory: float
    flops: float
    memory_bandwidth: float
    network_bandwidth: float


_GIB = 2.0**30
DEVICES = {
    each.name: each
    for each in (
        Device("v4", 32 * _GIB, 275e12, 1228e9, 300e9),
        Device("v5e", 16 * _GIB, 197e12, 819e9, 200e9),
        Device("v5p", 95 * _GIB, 459e12, 2765e9, 600e9),
        Device("v6e", 32 * _GIB, 918e12, 1640e9, 448e9),
        Device("a100", 80e9, 312e12, 2039e9, 600e9),
        Device("h100", 80e9, 989e12, 3350e9, 900e9),
        Device("h200", 141e9, 989e12, 4800e9, 900e9),
        Device("b200", 180e9, 2250e12, 7700e9, 1800e9),
    )
}
TPUS = ("v4", "v5e", "v5p", "v6e")


@dataclass(frozen=True)
class Target:
    """Where a run is planned for.

    Attributes:
      device: what each device can do.
      topology: of TPUs, such as ``2x2x2``; None for other devices.
      count: devices in all.
      slices: how many slices of that topology there are.
      compiled_for: what the program is really compiled for: ``tpu`` or ``cpu``.
    """

    device: Device
    topology: str | None
    count: int
    slices: int
    compiled_for: str

    @property
    def name(self) -> str:
        """For people."""
        where = f"{self.device.name}:{self.topology or self.count}"
        return f"{self.slices} x {where}" if self.slices > 1 else where


def parse_target(text: str) -> Target:
    """Read ``v5p:2x2x2``, ``2*v5e:16x16`` (two slices) or ``h100:8``.

    Raises:
      InputError: an unknown device, or sizes that are none.
    """
    slices, _, rest = text.rpartition("*")
    kind, _, size = rest.partition(":")
    device = DEVICES.get(kind.lower())
    if device is None:
        raise InputError(f"--on: {text}: unknown device {kind!r}; choose {', '.join(DEVICES)}.")
    try:
        sizes = [int(part) for part in size.split("x")]
        several = int(slices or 1)
    except ValueError:
        sizes, several = [0], 1
    dimensions = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}.get(device.name, 1)
    if min(*sizes, several, 1) < 1 or len(sizes) != dimensions:
        example = {3: "2x2x2", 2: "4x4", 1: "8"}[dimensions]
        raise InputError(
            f"--on: {text}: give {dimensions} sizes of {device.name}, such as "
            f"{device.name}:{example}."
        )
    if math.prod(sizes) * several > _MOST:
        raise InputError(f"--on: {text}: more than {_MOST:,} devices; give fewer.")
    tpu = device.name in TPUS and importlib.util.find_spec("libtpu") is not None
    return Target(
        device,
        size if device.name in TPUS else None,
        math.prod(sizes) * several,
        several,
        "tpu" if tpu else "cpu",
    )


def prepare_compiler(target: Target) -> None:
    """Set the environment so that JAX compiles for the target. Must come before JAX finds devices.

    Raises:
      InputError: JAX has found its devices already, and they are too few.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if target.compiled_for == "tpu":
        # The compiler asks neither a device nor, for what it compiles, the network.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at once
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{target.device.name}-8")
        return
    flag = f"--xla_force_host_platform_device_count={target.count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    os.environ.setdefault("PJRT_NPROC", "64")
    jax.config.update("jax_platforms", "cpu")  # type: ignore[no-untyped-call]
    if jax.device_count() < target.count:
        raise InputError(
            f"--on: {target.name} needs {target.count} virtual devices, and JAX has begun with "
            f"{jax.device_count()}; call this before anything else uses JAX."
        )


def planned_mesh(section: MeshSection, target: Target) -> Mesh:
    """The mesh that training makes of a configuration, over described devices.

    Raises:
      InputError: the sizes do not make the devices, or the compiler knows no such topology.
    """
    if target.compiled_for == "cpu":
        return make_mesh(section, jax.devices()[: target.count], target.slices)
    from jax.experimental import topologies

    # A chip of v4 has two cores, which training sees as one device.
    cores = {"chip_config_name": "megacore"} if target.device.name == "v4" else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{target.device.name}:{target.topology}",
            num_slices=target.slices,
            **cores,
        )
    except Exception as error:  # of libtpu, whose errors have no common type
        raise InputError(
            f"--on: the compiler knows no {target.name} ({str(error).splitlines()[0]})."
        ) from error
    return make_mesh(section, described.devices)
