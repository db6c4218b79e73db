"""What accelerators can do, as their makers publish it.

Rates are for dense bfloat16, from Google's Cloud TPU pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU
v6e", and from NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200. Network is what
one device sends and receives in all to its neighbours.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    Attributes:
      name: as in ``ogpsa-jax plan --on``.
      kinds: how the ``device_kind`` of its JAX devices begins.
      memory: bytes.
      flops: bfloat16 operations a second.
      memory_bandwidth: bytes a second.
      network_bandwidth: bytes a second, to all neighbours in the slice or the machine.
    """

    name: str
    kinds: tuple[str, ...]
    memory: float
    flops: float
    memory_bandwidth: float
    network_bandwidth: float


_GIB = 2.0**30
DEVICES = {
    each.name: each
    for each in (
        Device("v4", ("TPU v4",), 32 * _GIB, 275e12, 1228e9, 300e9),
        Device("v5e", ("TPU v5 lite", "TPU v5e"), 16 * _GIB, 197e12, 819e9, 200e9),
        Device("v5p", ("TPU v5p", "TPU v5"), 95 * _GIB, 459e12, 2765e9, 600e9),
        Device("v6e", ("TPU v6 lite", "TPU v6e"), 32 * _GIB, 918e12, 1640e9, 448e9),
        Device("a100", ("NVIDIA A100",), 80e9, 312e12, 2039e9, 600e9),
        Device("h100", ("NVIDIA H100",), 80e9, 989e12, 3350e9, 900e9),
        Device("h200", ("NVIDIA H200",), 141e9, 989e12, 4800e9, 900e9),
        Device("b200", ("NVIDIA B200",), 180e9, 2250e12, 7700e9, 1800e9),
    )
}


def accelerator(device_kind: str) -> Device | None:
    """The one whose JAX devices are of this kind; None where it is not in the table."""
    known = [(kind, device) for device in DEVICES.values() for kind in device.kinds]
    fitting = [(len(kind), device) for kind, device in known if device_kind.startswith(kind)]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None
