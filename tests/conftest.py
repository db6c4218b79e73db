"""Shared by all tests: eight virtual CPU devices, and the folder of real data if there is one."""

import os
from pathlib import Path

# Before anything imports jax. Most of the suite's time is the compiler's: unless XLA_FLAGS is set
# (to nothing, say), it is to compile fast rather than well. Eight devices share few cores: they
# may wait long for each other.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] += (
    " --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
)
# By default there are eight threads for them to wait in (or one per core). Where a step has several
# independent collectives, half of them can take all threads for one, half for another: forever.
os.environ.setdefault("PJRT_NPROC", "64")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by OGPSA_DATA (default ../shared): real models, data sets, trajectories."""
    folder = Path(os.environ.get("OGPSA_DATA", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder}/data does not exist (set OGPSA_DATA)")
    return folder
