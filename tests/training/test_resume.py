"""Exact resume: whatever interrupts a run, it ends with the bits of one never interrupted."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from ogpsa_jax.config import RunConfig
from ogpsa_jax.errors import InputError
from ogpsa_jax.training import run

from .conftest import STEPS, command, environment, metrics, train_in_process

Configured = Callable[..., RunConfig]


def saved_state(run_dir: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name: parameters, moments, basis, counters."""
    folder = run_dir.absolute() / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(folder, restore_args=as_numpy)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored)
    }


def assert_same_end(run_dir: Path, other: Path) -> None:
    """The same export, last checkpoint and metrics, to the bit."""
    weights = "export/model.safetensors"
    assert (run_dir / weights).read_bytes() == (other / weights).read_bytes()
    ours, theirs = saved_state(run_dir), saved_state(other)
    assert ours.keys() == theirs.keys()
    assert any("basis" in name for name in ours)
    different = [name for name in ours if not np.array_equal(ours[name], theirs[name])]
    assert not different
    assert metrics(run_dir) == metrics(other)


@pytest.fixture(scope="module")
def alone(ground, compilation_cache_dir, tmp_path_factory) -> Path:
    """The run directory of the small run in a process of its own, never interrupted.

    These tests' own process has eight virtual devices, and XLA cuts sums over its threads
    otherwise there: the same within round-off only.
    """
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    done = train_in_process(compilation_cache_dir, ground / "run.yaml", f"output_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return Path(run_dir)


def test_the_reference_run_has_a_line_for_every_step_and_evaluation(uninterrupted):
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "eval/general/loss" in line] == [0, 4, 8]
    assert [line["step"] for line in lines if line.get("refreshed")] == [1, 6]


def test_stopped_and_killed_at_random_instants_a_run_ends_with_the_same_bits(
    ground, alone, compilation_cache_dir, tmp_path
):
    run_dir = tmp_path / "killed"
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        # From the first line on, when data and model are read and steps begin.
        path = run_dir / "metrics.jsonl"
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen(
            command(ground / "run.yaml", f"output_dir={run_dir}"),
            env=environment(compilation_cache_dir),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None:
            if path.exists() and path.stat().st_mtime_ns > before:
                time.sleep(draw.uniform(0.0, 2.0) if number == signal.SIGKILL else 0.0)
                break
            time.sleep(0.02)
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
        if number == signal.SIGTERM:
            assert process.returncode == 143, said
            saved = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
            assert f"step {saved} of {STEPS} is saved" in said
            assert "Traceback" not in said
    done = train_in_process(compilation_cache_dir, ground / "run.yaml", f"output_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert_same_end(run_dir, alone)


def test_killed_within_and_between_its_stages_a_pipeline_ends_with_the_same_bits(
    ground, compilation_cache_dir, tmp_path
):
    """SFT, then DPO from its result: the last kill falls before the summary over both."""
    sft = yaml.safe_load((ground / "run.yaml").read_text())
    dpo = sft | {
        "objective": "dpo",
        "data": sft["data"] | {"train": [{"path": str(ground / "pairs.jsonl")}]},
        "ogpsa": {"preset": "paper", "refresh": {"every": 5}},
        "references": sft["references"] | {"loss": "response"},
        "dpo": {"beta": 0.2},
    }

    def stages(where: Path) -> list[Path]:
        files = []
        for name, config in (("sft", sft), ("dpo", dpo)):
            files.append(where / f"{name}.yaml")
            where.mkdir(exist_ok=True)
            files[-1].write_text(yaml.safe_dump(config | {"output_dir": str(where / name)}))
        return files

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = train_in_process(compilation_cache_dir, *stages(whole))
    assert done.returncode == 0, done.stderr
    files = stages(broken)
    for sign in ("sft/metrics.jsonl", "sft/summary.json", "dpo/metrics.jsonl", "dpo/summary.json"):
        process = subprocess.Popen(
            command(*files),
            env=environment(compilation_cache_dir),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (broken / sign).exists():
            time.sleep(0.002)
        process.kill()
        process.wait(timeout=300)
        assert (broken / sign).exists()
    done = train_in_process(compilation_cache_dir, *files)
    assert done.returncode == 0, done.stderr
    for stage in ("sft", "dpo"):
        assert_same_end(broken / stage, whole / stage)
    ours, theirs = (
        json.loads((each / "dpo/pipeline.json").read_text()) for each in (broken, whole)
    )
    for summaries in (ours, theirs):
        for summary in summaries["stages"]:
            for name in ("seconds", "export"):
                del summary[name]
    assert ours == theirs
    assert [summary["objective"] for summary in ours["stages"]] == ["sft", "dpo"]


@pytest.mark.parametrize("step", [3, 6, STEPS])
def test_a_run_goes_on_exactly_from_each_of_its_checkpoints(
    step, interrupted, uninterrupted, on_some_devices, configured, caplog
):
    for path in (interrupted / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    # The kill left half a line, and half a checkpoint.
    with (interrupted / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    (interrupted / "checkpoints" / f"{step + 1}.orbax-checkpoint-tmp-0" / "default").mkdir(
        parents=True
    )
    with caplog.at_level("INFO", "ogpsa_jax"):
        run.train(configured(interrupted))
    assert f"resuming from the checkpoint of step {step}" in caplog.text
    assert_same_end(interrupted, uninterrupted)
    assert not list((interrupted / "checkpoints").glob("*tmp*"))


def test_with_metrics_but_no_checkpoint_a_run_starts_anew(
    interrupted, uninterrupted, on_some_devices, configured
):
    shutil.rmtree(interrupted / "checkpoints")
    run.train(configured(interrupted))
    assert_same_end(interrupted, uninterrupted)


def tear(folder: Path, how: str) -> None:
    """Damage the files of a checkpoint that hold its arrays or say where they are."""
    for path in folder.rglob("*"):
        if path.is_file() and (path.parent.name == "d" or path.name == "_METADATA"):
            size = path.stat().st_size
            if how == "truncated":
                os.truncate(path, size // 2)
            elif how == "emptied":
                path.write_bytes(bytes(size))
            elif path.name == "_METADATA":
                path.unlink()


@pytest.mark.parametrize("how", ["truncated", "emptied", "without metadata"])
def test_a_torn_checkpoint_is_kept_aside_and_the_one_before_is_used(
    how, interrupted, uninterrupted, on_some_devices, configured, caplog, capsys
):
    tear(interrupted / "checkpoints" / str(STEPS), how)
    torn = sorted(
        path.relative_to(interrupted / "checkpoints")
        for path in (interrupted / "checkpoints" / str(STEPS)).rglob("*")
    )
    with caplog.at_level("INFO", "ogpsa_jax"):
        run.train(configured(interrupted))
    assert f"checkpoint of step {STEPS} is torn" in caplog.text
    assert "resuming from the checkpoint of step 6" in caplog.text
    assert "Traceback" not in capsys.readouterr().err
    aside = interrupted / "checkpoints-unreadable"
    assert sorted(path.relative_to(aside) for path in (aside / str(STEPS)).rglob("*")) == torn
    assert_same_end(interrupted, uninterrupted)


def test_where_every_checkpoint_is_torn_the_run_says_so_and_then_starts_anew(
    interrupted, uninterrupted, on_some_devices, configured
):
    for path in (interrupted / "checkpoints").iterdir():
        tear(path, "truncated")
    with pytest.raises(InputError, match="every checkpoint is torn"):
        run.train(configured(interrupted))
    run.train(configured(interrupted))
    assert_same_end(interrupted, uninterrupted)


def test_a_checkpoint_of_another_model_stops_the_run_and_stays(
    interrupted, on_some_devices, configured
):
    before = saved_state(interrupted)
    settings = interrupted / "config.yaml"
    settings.write_text(settings.read_text().replace("rank: 2", "rank: 3"))
    with pytest.raises(InputError, match=r"has another model or optimizer \(.*basis"):
        run.train(configured(interrupted, "ogpsa.rank=3"))
    assert saved_state(interrupted).keys() == before.keys()


def test_a_checkpoint_that_may_be_readable_later_stops_the_run_and_stays(
    interrupted, on_some_devices, configured, monkeypatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", refuse)
        with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
            run.train(configured(interrupted))
    assert (interrupted / "checkpoints" / str(STEPS)).is_dir()


# The limit strikes the compilation cache too, where the step is not in it yet.
@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache")
def test_a_full_disk_is_told_in_one_sentence_and_nothing_is_lost(
    interrupted, uninterrupted, on_some_devices, configured
):
    resource = pytest.importorskip("resource", reason="limits on file sizes need POSIX")
    for step in (6, STEPS):
        shutil.rmtree(interrupted / "checkpoints" / str(step))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Larger than metrics and events; smaller than the embedding, 66,560 bytes of random numbers
    # that do not compress, whatever the number of files that a checkpoint is cut into.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(InputError, match=r"step 6 could not be written .*step 3 is whole"):
            run.train(configured(interrupted))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (interrupted / "checkpoints").glob("[0-9]")] == ["3"]
    run.train(configured(interrupted))
    assert_same_end(interrupted, uninterrupted)
