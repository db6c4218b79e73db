"""Shared by all tests: eight virtual CPU devices, a folder to stand in, and real data if any.

What a person has done in the checkout or in the shell must not decide what a test finds. So tests
stand in a folder of their own, in which nothing has been made; caches are their own; what the
documents tell people to export is not seen; and nobody beyond this machine is asked.
"""

import json
import os
import random
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

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

# What people export to run several processes, to name a judge's key, to move a cache.
_UNSEEN = (
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"),
    *("JAX_ENABLE_X64", "JAX_DEBUG_NANS", "OPENAI_API_KEY"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_TOKEN"),
)
for name in _UNSEEN:
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
# Not empty in matplotlib's case: it would list all fonts of the machine again.
_USERS_CACHE = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
os.environ.setdefault("MPLCONFIGDIR", str(Path(_USERS_CACHE) / "matplotlib"))
_CACHE = tempfile.TemporaryDirectory(prefix="ogpsa-jax-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name
# Named from where the tests were started; they stand elsewhere.
os.environ["OGPSA_DATA"] = str(
    Path(os.environ.get("OGPSA_DATA", REPOSITORY.parent / "shared")).resolve()
)

_LINKED = ("CHANGELOG.md", "README.md", "configs", "docs", "mkdocs.yml", "scripts", "tests")


@pytest.fixture(scope="session", autouse=True)
def _fresh_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder that has the checkout's files, and nothing of what its commands made."""
    folder, before = tmp_path_factory.mktemp("checkout"), Path.cwd()
    for name in _LINKED:
        if (REPOSITORY / name).exists():  # the core's tests may have been copied alone
            (folder / name).symlink_to(REPOSITORY / name)
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True)
def _left_as_found(_fresh_folder: Path) -> Iterator[None]:
    """What a test leaves in the current folder, no other test finds."""
    yield
    for path in _fresh_folder.iterdir():
        if path.is_symlink():
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="session", autouse=True)
def _untouched_checkout() -> Iterator[None]:
    """Fail where the tests have made something in the checkout, or changed what a command made."""
    before = _made_in_checkout()
    yield
    after = _made_in_checkout()
    changed = sorted(str(path) for path in after if after[path] != before.get(path))
    assert not changed, (
        f"while the tests ran, these were written into the checkout: {', '.join(changed[:9])}. "
        "Tests write below tmp_path."
    )


_OUTPUTS = ("runs", "report", "evaluations", "data")


def _made_in_checkout() -> dict[Path, float]:
    """The outputs of commands, each with its time, and every other file but code and caches."""
    found: dict[Path, float] = {}
    for folder, names, files in os.walk(REPOSITORY):
        names[:] = [n for n in names if not n.startswith(".") and n not in ("__pycache__", "site")]
        place = Path(folder).relative_to(REPOSITORY)
        output = place.parts[:1] and place.parts[0] in _OUTPUTS
        for name in files:
            if output or not name.endswith((".py", ".md")):  # which people write meanwhile
                found[place / name] = (Path(folder) / name).stat().st_mtime if output else 0.0
    return found


@pytest.fixture(scope="session", autouse=True)
def _nobody_is_asked() -> Iterator[None]:
    """Connections of this process go to this machine alone."""
    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test asked {host}: tests need no network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local)
        yield


@pytest.fixture(scope="session")
def unseen() -> tuple[str, ...]:
    """Names of the variables that tests do not see, whoever has exported them."""
    return _UNSEEN


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by OGPSA_DATA (default ../shared): real models, data sets, trajectories."""
    folder = Path(os.environ["OGPSA_DATA"])
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder}/data does not exist (set OGPSA_DATA)")
    return folder


@pytest.fixture
def drawn() -> random.Random:
    """Random inputs, from a seed drawn afresh and printed."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


@pytest.fixture
def write_run() -> Callable[..., None]:
    """Writes the configuration and the summary of a finished run.

    Called with its folder, keys of the configuration, and ``summary=`` keys of the summary.
    """
    import yaml

    from ogpsa_jax.config import RunConfig, dump_config

    def write(folder: Path, *, summary: dict[str, Any] | None = None, **keys: Any) -> None:
        content = {"optimizer": {"learning_rate": 1e-6}, "output_dir": str(folder), **keys}
        config = RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(content)))
        figures = {
            "name": config.name,
            "objective": config.objective,
            "preset": config.ogpsa.preset,
            "seed": config.seed,
            "steps": 41,
            "train_loss": {"first": 2.0, "last": 1.0},
            "before": {},
            "after": {},
            "change": {},
            "training_samples": 0,
            "reference_samples": 0,
            "seconds": 0.0,
            "devices": "1 x cpu",
            "export": str(folder / "export"),
            "data": {},
            "warnings": [],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "summary.json").write_text(json.dumps(figures | (summary or {})))

    return write
