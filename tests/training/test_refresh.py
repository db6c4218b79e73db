"""Refreshes at intervals: when they come by distance, and what the metrics then say."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ogpsa_jax.training import run
from ogpsa_jax.training.run import train

from .conftest import STEPS, metrics, some_devices
from .test_mesh import assert_same_numbers
from .test_resume import assert_same_end, saved_state

DISTANCE = 0.004
BY_DISTANCE = (f"ogpsa.refresh={{distance: {DISTANCE}}}", "references.batch_size=12")
TOLD = {"references.0/loss", "reference/loss", "reference/captured_fraction", "distance_moved"}


@pytest.fixture(scope="module")
def by_distance(configured, tmp_path_factory) -> Path:
    """A run that refreshes by distance, with every checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "by-distance"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", some_devices)
        train(configured(folder, *BY_DISTANCE, "train.save_every=1", "train.keep_checkpoints=99"))
    return folder


def parameters(run_dir: Path, step: int, field: str = "params") -> np.ndarray:
    """All of a checkpoint's parameters, or of the copy in it, as one vector."""
    state = saved_state(run_dir, step)
    names = sorted(name for name in state if name.startswith(f"['{field}']"))
    assert names
    return np.concatenate([state[name].astype(np.float64).ravel() for name in names])


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if "loss" in line]


def test_a_refresh_comes_when_the_parameters_have_moved_so_far(by_distance):
    lines = steps_of(by_distance)
    last = parameters(by_distance, 1, "at_refresh")  # the weights before the first step
    wanted = [1]
    for step in range(1, STEPS):
        now = parameters(by_distance, step)
        moved = np.linalg.norm(now - last) / np.linalg.norm(last)
        if moved >= DISTANCE:
            wanted.append(step + 1)
            # A norm of float32 squares.
            assert lines[step]["distance_moved"] == pytest.approx(moved, rel=1e-4)
            last = now
        assert np.array_equal(parameters(by_distance, step + 1, "at_refresh"), last)
    assert [line["step"] for line in lines if line["refreshed"]] == wanted
    assert 2 < len(wanted) < STEPS  # else the distance decides nothing here


def test_the_line_of_a_refresh_says_what_it_found(by_distance):
    start, lines = metrics(by_distance)[0], steps_of(by_distance)
    first, *later = [line for line in lines if line["refreshed"]]
    # Of a single batch the mean over batches is that over tokens, as before the first step.
    assert first["references.0/loss"] == pytest.approx(start["references.0/loss"], rel=1e-5)
    assert TOLD - first.keys() == {"reference/captured_fraction", "distance_moved"}
    for line in later:
        assert line.keys() >= TOLD
        assert line["reference/loss"] == line["references.0/loss"]
        # The same rows at weights that have hardly moved.
        assert 0.1 < line["reference/captured_fraction"] <= 1.0
    for line in lines:
        assert line["refreshed"] or not TOLD & line.keys()
    assert not any("reference/gradient_cosine" in line for line in lines)  # of one set


def test_of_two_sets_the_cosine_is_told(configured, tmp_path, on_some_devices):
    config = configured(tmp_path / "run", "train.steps=2")
    one = config.references.sets[0]
    twice = config.references.model_copy(update={"sets": (one, one)})
    train(config.model_copy(update={"references": twice}))
    first = steps_of(tmp_path / "run")[0]
    assert first["reference/gradient_cosine"] == pytest.approx(1.0, abs=1e-5)
    assert first["reference/loss"] == pytest.approx(first["references.1/loss"])


@pytest.mark.parametrize("step", [1, 3, 6])
def test_cut_short_a_run_goes_on_to_the_same_bits(
    step, by_distance, configured, tmp_path, on_some_devices
):
    cut = tmp_path / "cut"
    shutil.copytree(by_distance, cut)
    for folder in (cut / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    shutil.rmtree(cut / "export")
    for name in ("summary.json", "curves.png"):
        (cut / name).unlink()
    train(configured(cut, *BY_DISTANCE, "train.save_every=1", "train.keep_checkpoints=99"))
    assert_same_end(cut, by_distance)


@pytest.mark.parametrize(
    "settings",
    [("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"), ("train.micro_batch_size=8",)],
    ids=["devices", "accumulation"],
)
def test_devices_and_accumulation_change_no_refresh(
    settings, by_distance, configured, tmp_path, on_some_devices
):
    train(configured(tmp_path / "run", *BY_DISTANCE, *settings))
    assert_same_numbers(tmp_path / "run", by_distance)


def test_refreshes_compile_nothing_anew(configured, tmp_path, on_some_devices, caplog):
    jax.clear_caches()
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(configured(tmp_path / "run", *BY_DISTANCE, *mesh, "data.eval={}"))
    lines = steps_of(tmp_path / "run")
    assert sum(line["refreshed"] for line in lines) > 2
    for name in ("train_step", "refresh_step", "distance_moved"):
        compiled = [m for m in caplog.messages if m.startswith(f"Compiling jit({name})")]
        assert len(compiled) == 1, (name, compiled)
