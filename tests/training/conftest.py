"""A small real run, made once: data drawn from a printed seed, a random model, a configuration."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import yaml
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from ogpsa_jax.config import RunConfig, load_config
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.data import TrainBatches
from ogpsa_jax.models import Decoder, save_pretrained
from ogpsa_jax.models.config import read_config
from ogpsa_jax.reporting.model_card import write_missing_card
from ogpsa_jax.training import Hooks, run
from ogpsa_jax.training.mesh import AXES

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = REPOSITORY / "configs/models/tiny"
STEPS = 8
WORDS = "red green blue seven nine river stone cloud table window never always open close".split()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Equal programs are compiled once for all runs of these tests, in whatever process."""
    folder = tmp_path_factory.mktemp("compiled")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder))
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and ``run.yaml``."""
    folder = tmp_path_factory.mktemp("ground")
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    for name in ("safety", "general"):
        rows = [{"prompt": text(1, 3), "completion": text(2, 6)} for _ in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": text(1, 3), "chosen": f"no {text(2, 4)}", "rejected": f"yes {text(2, 4)}"}
        for _ in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    model = Decoder(read_config(TINY), rngs=nnx.Rngs(seed), dtype="float32")
    save_pretrained(model, folder / "model", source=TINY)
    config = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": [{"path": str(folder / "safety.jsonl")}],
            "eval": {"general": {"path": str(folder / "general.jsonl")}},
            "max_length": 128,
        },
        "references": {
            "sets": [{"path": str(folder / "general.jsonl"), "samples": 12}],
            "loss": "response",
        },
        # Longer than the save interval: a resumed run needs the basis of the checkpoint.
        "ogpsa": {"preset": "paper", "refresh": {"every": 5}, "project_momentum": True},
        # A large epsilon: where a gradient is zero but for round-off (the key projections' bias),
        # Adam's normalised step would otherwise be noise of the size of the learning rate.
        "optimizer": {"learning_rate": 1e-3, "eps": 1e-3},
        "train": {
            **{"steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "remat": "none"},
            **{"save_every": 3, "keep_checkpoints": 3, "log_every": 2, "eval_every": 4},
        },
        "output_dir": str(folder / "never"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def configured(ground: Path) -> Callable[..., RunConfig]:
    """``configured(output_dir, *overrides)``: the small run's configuration."""

    def configure(output_dir: Path, *overrides: str) -> RunConfig:
        return load_config(ground / "run.yaml", [f"output_dir={output_dir}", *overrides])

    return configure


def some_devices(section: MeshSection) -> Mesh:
    """A mesh over the first devices only; -1 counts as 1."""
    names = tuple(axis for axis in AXES if axis != "context" or section.context > 1)
    shape = tuple(max(getattr(section, axis), 1) for axis in names)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


@pytest.fixture
def on_some_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs take as many of the eight devices as their mesh asks for."""
    monkeypatch.setattr(run, "make_mesh", some_devices)


@pytest.fixture(scope="session")
def uninterrupted(configured: Callable[..., RunConfig], tmp_path_factory: Any) -> Path:
    """The run directory of the small run on one device, never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", some_devices)
        run.train(configured(folder), Hooks(on_finish=write_missing_card))
    return folder


@pytest.fixture
def interrupted(uninterrupted: Path, tmp_path: Path) -> Path:
    """A copy of that run as a kill between its last checkpoint and its export leaves it."""
    copy = tmp_path / "interrupted"
    shutil.copytree(uninterrupted, copy)
    shutil.rmtree(copy / "export")
    for name in ("summary.json", "curves.png"):
        (copy / name).unlink()
    return copy


def command(*arguments: Any) -> list[str]:
    """``ogpsa-jax train`` with these arguments, in a process of its own."""
    return [sys.executable, "-m", "ogpsa_jax.cli", "train", *map(str, arguments)]


def environment(cache: Path, **changes: str) -> dict[str, str]:
    """One CPU device, and the compiled programs of before."""
    return {
        **os.environ,
        "XLA_FLAGS": re.sub(
            r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
        ),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        **changes,
    }


def train_in_process(
    cache: Path, *arguments: Any, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run :func:`command` to its end."""
    return subprocess.run(
        command(*arguments),
        env=environment(cache, **changes),
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each of which must be whole."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of cached model outputs, of one test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ogpsa_jax"


@pytest.fixture
def prompts(ground: Path, tmp_path: Path) -> Path:
    """The general rows without their answers."""
    rows = [json.loads(row) for row in (ground / "general.jsonl").read_text().splitlines()]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return path


def epoch_total(
    loss: Callable[..., Any], model: Any, examples: Any, packing: bool, rows: int
) -> tuple[float, float]:
    """Sums of ``loss(model, batch) -> (loss, weight)`` over the batches of one epoch."""
    batches = TrainBatches(
        examples,
        **{"batch_size": rows, "micro_batch_size": rows, "max_length": 128},
        **{"packing": packing, "seed": 1},
    )
    sums = [
        loss(model, {name: jnp.asarray(array[0]) for name, array in batches.batch(i).items()})
        for i in range(len(batches))
    ]
    return sum(float(s) for s, _ in sums), sum(float(w) for _, w in sums)
