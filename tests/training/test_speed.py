"""How fast a run says it is: by a clock of ours, and by figures that can be worked out by hand."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ogpsa_jax.accelerators import DEVICES, accelerator
from ogpsa_jax.models.config import read_config
from ogpsa_jax.training.run import train
from ogpsa_jax.training.speed import SpeedMeter, model_flops

from .conftest import STEPS, TINY, train_in_process
from .test_mesh import assert_same_numbers


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def batch(tokens: int, padding: int = 0) -> dict[str, np.ndarray]:
    real = np.arange(tokens + padding) < tokens
    return {
        "segment_ids": real.astype(np.int32)[None],
        "positions": np.where(real, np.arange(len(real)), 0).astype(np.int32)[None],
    }


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock, tmp_path, monkeypatch) -> SpeedMeter:
    monkeypatch.setattr("ogpsa_jax.training.speed.accelerator", lambda kind: DEVICES["v5e"])
    return SpeedMeter(
        tmp_path / "speed.jsonl", read_config(TINY), half=True, frozen=False, clock=clock
    )


def test_steps_alone_are_measured(meter, clock, tmp_path):
    meter.add(batch(5))
    clock.now = 100.0  # compilation
    assert meter.measured(1) == {}
    for _ in range(4):
        with meter.waiting():
            clock.now += 0.5
            meter.add(batch(10, padding=6))
        meter.add_tokens(batch(2))
        clock.now += 1.5
    with meter.excluded(()):
        clock.now += 1000.0  # a refresh
    found = meter.measured(5)
    devices = jax.device_count()
    assert found["step_seconds"] == pytest.approx(2.0)
    assert found["tokens_per_second"] == pytest.approx(4 * 12 / 8.0)
    assert found["tokens_per_second_per_device"] == pytest.approx(4 * 12 / 8.0 / devices)
    assert found["data_wait"] == pytest.approx(0.25)
    flops = 4 * model_flops(read_config(TINY), 12, 55 + 3, frozen=False)
    assert found["mfu"] == pytest.approx(flops / 8.0 / devices / DEVICES["v5e"].flops)
    [line] = map(json.loads, (tmp_path / "speed.jsonl").read_text().splitlines())
    assert line == {"step": 5, **found}
    clock.now += 7.0  # an evaluation
    meter.restart()
    meter.add(batch(10))
    clock.now += 1.0
    assert meter.measured(6)["step_seconds"] == pytest.approx(1.0)


def test_operations_are_those_of_the_matrices_and_the_scores():
    config = read_config(TINY)
    heads = config.num_heads * config.head_dim
    layer = (2 * heads + 2 * config.num_kv_heads * config.head_dim) * config.hidden_size
    layer += 3 * config.hidden_size * config.intermediate_size
    matrices = config.num_layers * layer + config.vocab_size * config.hidden_size
    assert model_flops(config, 10, 0, frozen=False) == 6 * 10 * matrices
    assert model_flops(config, 10, 0, frozen=True) == 4 * 10 * matrices
    scores = model_flops(config, 0, 55, frozen=False)
    assert scores == 3 * 4 * config.num_layers * heads * 55


def test_devices_are_found_by_the_longest_name_that_fits():
    found = {kind: accelerator(kind) for kind in ("TPU v5", "TPU v5 lite", "TPU v5p", "cpu")}
    names = {kind: device.name if device else None for kind, device in found.items()}
    assert names == {"TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v5p": "v5p", "cpu": None}
    assert accelerator("NVIDIA H100 80GB HBM3") is DEVICES["h100"]


def test_a_run_writes_its_speed_and_no_utilization_of_an_unknown_device(
    configured, tmp_path, on_some_devices
):
    train(configured(tmp_path / "run", "train.log_every=2"))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "speed.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["step"] == STEPS
    for line in lines:
        assert line["step_seconds"] > 0
        assert line["tokens_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert "mfu" not in line


def test_a_profile_is_written_and_changes_nothing(
    uninterrupted, configured, tmp_path, on_some_devices
):
    train(configured(tmp_path / "run", "train.profile={start: 3, steps: 2}"))
    assert_same_numbers(tmp_path / "run", uninterrupted)
    [trace] = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    names = {
        event.get("name")
        for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    }
    assert any("train_step" in str(name) for name in names)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_a_second_run_compiles_nothing_that_is_kept(ground, tmp_path, compilation_cache_dir):
    kept = tmp_path / "kept"
    programs = []
    for number in range(2):
        done = train_in_process(
            compilation_cache_dir,
            ground / "run.yaml",
            f"output_dir={tmp_path / str(number)}",
            f"train.compilation_cache={kept}",
            "train.steps=2",
            JAX_COMPILATION_CACHE_DIR="",
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
        assert done.returncode == 0, done.stderr
        programs.append({path.name for path in Path(kept).glob("*-cache")})
    assert any("train_step" in name for name in programs[0])
    assert programs[1] == programs[0]
