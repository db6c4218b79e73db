"""A process that is killed, stops, or fails ends all of its run, soon and with one sentence."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from ogpsa_jax.errors import InputError
from ogpsa_jax.training import processes
from ogpsa_jax.training.hooks import HookError
from ogpsa_jax.training.preemption import Terminated
from ogpsa_jax.training.processes import PEER_LOST, PeerLost

from . import test_processes
from .conftest import environment
from .test_processes import finish, free_port, start_two

WITHIN = 60  # seconds


def start_training(ground: Path, cache: Path, run_dir: Path) -> list[subprocess.Popen[str]]:
    """Two processes that have taken the first steps of a run that would take very long."""
    settings = ("mesh.data=2", "mesh.fsdp=1", "train.steps=100000", "train.log_every=1")
    arguments = (ground / "run.yaml", f"output_dir={run_dir}", *settings)
    processes = start_two(cache, *arguments)
    while not (run_dir / "metrics.jsonl").exists():
        if any(process.poll() is not None for process in processes):
            raise AssertionError(finish(processes))
        time.sleep(0.05)
    return processes


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_other_process_ends_with_one_sentence(
    how, lost, ground, compilation_cache_dir, tmp_path
):
    processes = start_training(ground, compilation_cache_dir, tmp_path / "run")
    other = processes[1 - lost]
    try:
        processes[lost].send_signal(how)
        since = time.monotonic()
        _, error = other.communicate(timeout=WITHIN)
        print(f"ended after {time.monotonic() - since:.1f} s")
        assert other.returncode == PEER_LOST, error
        assert f"(process {1 - lost} of 2) ends with exit code 75; start all" in error
        assert error.count("ends with exit code") == 1
        assert "Traceback" not in error
        assert "stack trace" not in error
        if how == signal.SIGSTOP:  # and when it goes on, it finds itself alone
            processes[lost].send_signal(signal.SIGCONT)
            _, error = processes[lost].communicate(timeout=WITHIN)
            assert processes[lost].returncode == PEER_LOST, error
    finally:
        for process in processes:
            process.kill()


ALONE = """
import os, sys
from ogpsa_jax import cli
from ogpsa_jax.errors import InputError
from ogpsa_jax.training import run

def fail(*_):
    raise InputError("the disk of this host is full.")

if os.environ["JAX_PROCESS_ID"] == sys.argv[1]:
    run.fit = fail
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_alone_ends_the_other(
    failing, ground, compilation_cache_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        test_processes, "command", lambda *given: [sys.executable, "-c", ALONE, *map(str, given)]
    )
    arguments = (ground / "run.yaml", f"output_dir={tmp_path / 'run'}", "mesh.data=2")
    processes = start_two(compilation_cache_dir, failing, *arguments, "mesh.fsdp=1")
    while processes[failing].poll() is None:
        time.sleep(0.05)
    since = time.monotonic()
    ends = finish(processes)
    assert time.monotonic() - since < WITHIN
    assert (ends[failing][0], ends[1 - failing][0]) == (2, PEER_LOST), ends
    assert "ogpsa-jax: the disk of this host is full." in ends[failing][2]
    assert "ends with exit code 75; start all" in ends[1 - failing][2]


def test_processes_that_fail_alike_say_why_and_none_is_lost(
    ground, compilation_cache_dir, tmp_path
):
    arguments = (ground / "run.yaml", f"output_dir={tmp_path / 'run'}", "mesh.data=2")
    settings = ("mesh.fsdp=1", "train.batch_size=7")
    ends = finish(start_two(compilation_cache_dir, *arguments, *settings))
    assert [code for code, _, _ in ends] == [2, 2], ends
    for _, _, error in ends:
        assert "set train.batch_size=8" in error
        assert "exit code" not in error


@pytest.mark.parametrize(
    "error, code",
    [
        (InputError("gs://data: Connection reset by peer."), 2),
        (HookError("on_step raised ConnectionError: Connection reset by peer"), 1),
        (OSError(28, "No space left on device"), 2),
        (KeyboardInterrupt(), 130),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), 1),
        (RuntimeError("UNAVAILABLE: Gloo AllGather failed: Connection closed by peer"), PEER_LOST),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), PEER_LOST),
        (Terminated(143), None),
    ],
)
def test_a_process_that_fails_leaves_with_the_code_of_its_error(error, code, monkeypatch):
    codes = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes, "_leave_at_exit", codes.append)
    with (
        pytest.raises(PeerLost if code == PEER_LOST else type(error)),
        processes.ending_together(),
    ):
        raise error
    assert codes == ([] if code is None else [code])


def test_a_process_alone_fails_as_ever(monkeypatch):
    monkeypatch.setattr(processes, "_leave_at_exit", None)
    with pytest.raises(ValueError, match="by peer"), processes.ending_together():
        raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_others_do_not_come_ends_with_one_sentence(
    process, ground, compilation_cache_dir, tmp_path
):
    waiting = (
        "import sys, jax; from ogpsa_jax import cli; join = jax.distributed.initialize; "
        "jax.distributed.initialize = lambda **given: join(**given, initialization_timeout=5); "
        "sys.exit(cli.main(['train', *sys.argv[1:]]))"
    )
    end = subprocess.run(
        [sys.executable, "-c", waiting, str(ground / "run.yaml"), f"output_dir={tmp_path / 'run'}"],
        env=environment(
            compilation_cache_dir,
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{free_port()}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(process),
        ),
        capture_output=True,
        text=True,
        timeout=WITHIN,
    )
    assert end.returncode == PEER_LOST, end
    assert "ogpsa-jax: the other processes of this run did not join in time, so" in end.stderr
    assert "Traceback" not in end.stderr
