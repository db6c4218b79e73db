"""The same numbers on every mesh, and shards that stay shards."""

import importlib.util
import itertools
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.planning.devices import parse_target, planned_mesh, prepare_compiler
from ogpsa_jax.training import loop, run
from ogpsa_jax.training.mesh import check_batch, make_mesh, rows_per_micro_batch

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


@dataclass(frozen=True)
class FakeDevice:
    """What a mesh is laid out by, of a TPU that is not here."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def fake_slices(sizes: Sequence[int], slices: int = 1, kind: str = "TPU v6 lite") -> list[Any]:
    places = itertools.product(range(slices), *(range(size) for size in (*sizes, 1, 1)[:3]))
    # In the order of processes, not of slices: a mesh must not rely on it.
    found = [
        FakeDevice(number, place, number_of_slice, kind)
        for number, (number_of_slice, *place) in enumerate(places)
        for place in [tuple(place)]
    ]
    return found[::2] + found[1::2]


def described(on: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the compiler for TPUs, libtpu, is absent")
    target = parse_target(on)
    prepare_compiler(target)
    return list(planned_mesh(MeshSection(), target).devices.flat)


def assert_close(group: Sequence[Any]) -> None:
    """The devices fill a box of one slice: each is a neighbour of another."""
    assert len({getattr(device, "slice_index", 0) for device in group}) == 1
    places = np.array([device.coords for device in group])
    assert math.prod(places.max(0) - places.min(0) + 1) == len(group), places


@pytest.mark.parametrize(
    "on, sizes",
    [
        ("v6e:16x16", (1, 64, 4)),
        ("v6e:16x16", (2, 64, 2)),
        ("v6e:16x16", (1, 256, 1)),
        ("v5p:4x4x4", (1, 32, 2)),
        ("v5p:4x4x8", (2, 8, 8)),
        ("v4:4x4x8", (4, 16, 2)),
        ("v5e:4x8", (2, 8, 2)),
    ],
)
@pytest.mark.parametrize("from_compiler", [False, True], ids=["fake", "described"])
def test_physical_axes_are_split_and_neighbours_share_a_row(on, sizes, from_compiler):
    kinds = {"v6e": "TPU v6 lite", "v5p": "TPU v5", "v4": "TPU v4", "v5e": "TPU v5 lite"}
    kind, _, topology = on.partition(":")
    devices = (
        described(on)
        if from_compiler
        else fake_slices([int(size) for size in topology.split("x")], kind=kinds[kind])
    )
    mesh = make_mesh(MeshSection(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]), devices)
    assert mesh.devices.shape == sizes
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    for group in mesh.devices.reshape(-1, sizes[2]):
        assert_close(group)


@pytest.mark.parametrize(
    "settings, shape",
    [
        ({}, (4, 16, 1)),
        ({"tensor": 2}, (4, 8, 2)),
        ({"data": 2, "tensor": 4}, (8, 2, 4)),
        ({"dcn_data": 4, "data": -1, "fsdp": 4}, (16, 4, 1)),
        ({"dcn_data": 2}, (2, 32, 1)),
        ({"dcn_data": 1}, (1, 64, 1)),
    ],
)
@pytest.mark.parametrize("from_compiler", [False, True], ids=["fake", "described"])
def test_replicas_lie_on_slices_and_what_they_shard_inside(settings, shape, from_compiler):
    devices = described("4*v5e:4x4") if from_compiler else fake_slices((4, 4), slices=4)
    mesh = make_mesh(MeshSection(**settings), devices)
    assert mesh.devices.shape == shape
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
    spanned = 4 // settings.get("dcn_data", 4)
    for replica in mesh.devices:
        assert len({device.slice_index for device in replica.flat}) == spanned
    for group in mesh.devices.reshape(-1, shape[2]):
        assert_close(group)
    # Within a replica on several slices, each slice has one block of the shards.
    blocks = mesh.devices.reshape(shape[0] * spanned, -1)
    assert all(len({device.slice_index for device in block}) == 1 for block in blocks)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"dcn_data": 3}, r"mesh.dcn_data: 3 .* slices, 4; set it to -1 or one of 1, 2, 4"),
        ({"dcn_data": 1, "data": 32, "fsdp": 2}, "mesh.fsdp = 2 is not a multiple of 4"),
        ({"fsdp": 3}, "dcn_data x data x fsdp x tensor = 4 x 1 x 3 x 1 does not make the 64"),
    ],
)
def test_sizes_that_do_not_fit_the_slices_are_told(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        make_mesh(MeshSection(**settings), fake_slices((4, 4), slices=4))


def test_slices_of_unequal_size_are_told():
    with pytest.raises(InputError, match="slices have unequal numbers of devices"):
        make_mesh(MeshSection(), fake_slices((4, 4), slices=2)[:-1])


def test_hosts_of_gpus_are_slices():
    kind = {"device_kind": "NVIDIA H100 80GB HBM3", "platform": "gpu"}
    gpus = [FakeDevice(n, (0, 0, 0), n // 8, process_index=n, **kind) for n in range(16)]
    mesh = make_mesh(MeshSection(), gpus)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "tensor": 1}
    assert [[device.slice_index for device in row.flat] for row in mesh.devices] == [
        [0] * 8,
        [1] * 8,
    ]
    assert dict(make_mesh(MeshSection(dcn_data=1), gpus).shape)["fsdp"] == 16


IN_STEP = ["ogpsa.preset=in-step", "ogpsa.project_momentum=false", "ogpsa.refresh=null"]


@pytest.mark.parametrize(
    "settings",
    [
        ["train.batch_size=128"],
        ["train.batch_size=128", "ogpsa.preset=recommended", *IN_STEP[1:]],
        ["train.batch_size=128", *IN_STEP],
        ["train.batch_size=256", *IN_STEP],
        ["train.batch_size=300", *IN_STEP, "references.in_step.share=0.3"],
        ["train.batch_size=300", *IN_STEP, "references.in_step.share=0.3717"],
        ["train.batch_size=8"],
        ["train.batch_size=96", "mesh.data=2", "mesh.tensor=2"],
        ["train.batch_size=96", *IN_STEP, "mesh.data=-1", "mesh.fsdp=2"],
    ],
)
def test_advice_on_an_uneven_batch_works(configured, settings):
    def checked(overrides: Sequence[str]) -> RunConfig:
        config = configured(Path("nowhere"), *overrides)
        check_batch(config, make_mesh(config.mesh, fake_slices((16, 16))))
        return config

    with pytest.raises(InputError, match=r"mesh.data x mesh.fsdp = \d+ x \d+ = \d+ row") as told:
        checked(settings)
    sentence = str(told.value)
    remedies = [
        re.findall(r"[\w.]+=[\d.]*\d", remedy)
        for remedy in sentence.partition("; set ")[2].split(", or ")
    ]
    assert remedies, sentence
    assert all(remedies), sentence
    for remedy in remedies:
        config = checked([*settings, *remedy])
        train = config.train
        if len(remedy) == 1:  # train.batch_size alone: the smallest that is no smaller than before
            mesh = make_mesh(config.mesh, fake_slices((16, 16)))
            before = configured(Path("nowhere"), *settings).train.batch_size
            for size in range(-(-before // 32) * 32, train.batch_size, 32):
                other = train.model_copy(update={"batch_size": size})
                with pytest.raises(InputError):
                    check_batch(config.model_copy(update={"train": other}), mesh)


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
