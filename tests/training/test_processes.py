"""Two processes on one machine: the numbers of one, saved, stopped and resumed together."""

import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ogpsa_jax.errors import InputError
from ogpsa_jax.training import run
from ogpsa_jax.training.processes import join_processes

from .conftest import STEPS, command, environment
from .test_mesh import WEIGHTS_ATOL, assert_same_numbers


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_two(cache: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            command(*arguments),
            env=environment(
                cache,
                JAX_COORDINATOR_ADDRESS=address,
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(index),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    ends = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=400)
            ends.append((process.returncode, out, error))
    finally:
        for process in processes:
            process.kill()
    return ends


def test_two_processes_stopped_by_a_signal_to_one_and_resumed_give_the_numbers_of_one(
    ground, uninterrupted, compilation_cache_dir, tmp_path
):
    run_dir = tmp_path / "two"
    arguments = (ground / "run.yaml", f"output_dir={run_dir}", "mesh.data=2", "mesh.fsdp=1")
    first, second = start_two(compilation_cache_dir, *arguments)
    while not (run_dir / "metrics.jsonl").exists() and first.poll() is None:
        time.sleep(0.05)
    second.terminate()
    stopped = finish([first, second])
    assert [code for code, _, _ in stopped] == [143, 143], stopped
    steps = [int(path.name) for path in (run_dir / "checkpoints").iterdir()]
    assert steps
    assert max(steps) < STEPS

    ends = finish(start_two(compilation_cache_dir, *arguments))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert f"resuming from the checkpoint of step {max(steps)}" in ends[0][2]
    assert_same_numbers(run_dir, uninterrupted)
    # The first process alone writes and shows progress.
    assert f"{STEPS} of {STEPS} steps" in ends[0][2]
    assert f"{STEPS} of {STEPS} steps" not in ends[1][2]
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(
        path.name for path in uninterrupted.iterdir()
    )


def test_two_processes_train_adapters_like_one(
    ground, configured, on_some_devices, compilation_cache_dir, tmp_path
):
    settings = ("model.lora.rank=2", "model.lora.dropout=0.1", "train.steps=2")
    run.train(configured(tmp_path / "one", *settings))
    arguments = (ground / "run.yaml", f"output_dir={tmp_path / 'two'}", "mesh.data=1")
    ends = finish(start_two(compilation_cache_dir, *arguments, "mesh.fsdp=2", *settings))
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert_same_numbers(tmp_path / "two", tmp_path / "one")
    one, two = (
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two")
    )
    assert any(name.endswith("lora_B.weight") and array.any() for name, array in one.items())
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=0, atol=WEIGHTS_ATOL, err_msg=name)


def test_a_half_described_process_is_told(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES is not"):
        join_processes()
