"""Devices that need not be here, and meshes of them for the compiler."""

import importlib.util
import math
import os
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from ogpsa_jax.accelerators import DEVICES, Device
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.training.mesh import make_mesh

_MOST = 100_000  # devices


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
