"""The same numbers on every mesh, and shards that stay shards."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.training import loop, run
from ogpsa_jax.training.mesh import make_mesh, rows_per_micro_batch

from .conftest import STEPS, metrics, some_devices

# Weights move by at most lr = 1e-3 a step. Sums in another order change a gradient of size 1 by
# some 1e-7, and Adam's step by lr / eps times that: 1e-7 a step.
WEIGHTS_ATOL = 2e-6
LOSS_RTOL = 2e-5


def assert_same_numbers(run_dir: Path, other: Path) -> None:
    ours, theirs = metrics(run_dir), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for name in ("loss", "weight", "eval/general/loss", "effective_rank", "refreshed"):
            if name in expected:
                assert line[name] == pytest.approx(expected[name], rel=LOSS_RTOL), (name, line)
    weights = [load_file(folder / "export/model.safetensors") for folder in (run_dir, other)]
    for name in weights[1]:
        np.testing.assert_allclose(
            weights[0][name], weights[1][name], rtol=0, atol=WEIGHTS_ATOL, err_msg=name
        )


@pytest.mark.parametrize(
    "data, fsdp, tensor, micro_batch_size",
    [(1, 1, 1, 8), (2, 2, 2, 2), (1, 8, 1, 1), (1, 1, 4, 4)],
)
def test_losses_and_weights_are_those_of_one_device(
    data, fsdp, tensor, micro_batch_size, uninterrupted, on_some_devices, configured, tmp_path
):
    mesh = [f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"]
    micro = f"train.micro_batch_size={micro_batch_size}"
    run.train(configured(tmp_path / "run", *mesh, micro))
    assert_same_numbers(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("attention", ["auto", "splash"])
def test_losses_and_weights_with_split_rows_are_those_of_one_device(
    attention, uninterrupted, on_some_devices, configured, tmp_path
):
    mesh = ["mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2"]
    run.train(configured(tmp_path / "run", *mesh, f"model.attention={attention}"))
    assert_same_numbers(tmp_path / "run", uninterrupted)


def test_a_run_is_resumed_on_another_number_of_devices(
    interrupted, uninterrupted, on_some_devices, configured
):
    for step in (6, STEPS):
        shutil.rmtree(interrupted / "checkpoints" / str(step))
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    run.train(configured(interrupted, *mesh))
    assert_same_numbers(interrupted, uninterrupted)


def test_moments_and_basis_lie_as_their_parameters_do(
    on_some_devices, configured, monkeypatch, tmp_path
):
    states = []
    saved = loop.Checkpoints.save

    def spy(self: object, step: int, state: object) -> None:
        states.append(jax.tree.map(lambda x: x.sharding, state))
        saved(self, step, state)

    monkeypatch.setattr(loop.Checkpoints, "save", spy)
    mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    run.train(configured(tmp_path / "run", *mesh))
    assert len(states) == 3
    for placed in states:
        wanted = {
            jax.tree_util.keystr(path): sharding
            for path, sharding in jax.tree_util.tree_leaves_with_path(placed.params)
        }
        assert any(sharding.spec for sharding in wanted.values())
        found = {
            jax.tree_util.keystr(path): sharding
            for path, sharding in jax.tree_util.tree_leaves_with_path(placed.opt_state)
        }
        for kind in (".basis[0]", ".basis[1]", ".mu", ".nu"):
            for name, sharding in wanted.items():
                (ours,) = [s for path, s in found.items() if path.endswith(kind + name)]
                assert ours.is_equivalent_to(sharding, 3), (kind, name, ours.spec, sharding.spec)
        copies = jax.tree_util.tree_leaves_with_path(placed.at_refresh)
        assert len(copies) == len(wanted)
        for path, ours in copies:
            assert ours.is_equivalent_to(wanted[jax.tree_util.keystr(path)], 3), path


def test_micro_batches_are_as_large_as_the_batch_allows(on_some_devices):
    mesh = some_devices(MeshSection(data=2, fsdp=2))
    assert rows_per_micro_batch(8, 4, mesh) == 8
    assert rows_per_micro_batch(24, 4, mesh) == 12  # 6 rows a shard: twice 3
    assert rows_per_micro_batch(28, 4, mesh) == 4  # 7 rows a shard: one by one
    with pytest.raises(InputError, match="multiple of 4"):
        rows_per_micro_batch(6, 4, mesh)


def test_sizes_that_do_not_make_the_devices_are_told(configured: Callable[..., RunConfig]):
    config = configured(Path("nowhere"), "mesh.data=3", "mesh.fsdp=2")
    with pytest.raises(InputError, match=r"3 x 2 x 1 does not make the 8 devices"):
        make_mesh(config.mesh)


def test_adapters_drop_the_same_of_pairs_on_every_mesh(
    ground, on_some_devices, configured, tmp_path
):
    settings = (
        *("objective=dpo", "ogpsa.preset=off", "references.sets=[]", "data.eval={}"),
        *(f"data.train=[{{path: {ground / 'pairs.jsonl'}}}]", "train.steps=2"),
        *("model.lora.rank=2", "model.lora.dropout=0.3"),
    )
    run.train(configured(tmp_path / "one", *settings))
    run.train(configured(tmp_path / "two", *settings, "mesh.data=1", "mesh.fsdp=2"))
    assert_same_numbers(tmp_path / "two", tmp_path / "one")
