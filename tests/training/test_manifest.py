"""A checkpoint one byte of which has changed since it was written is never used."""

import json
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from ogpsa_jax.errors import InputError
from ogpsa_jax.manifest import MANIFEST, check_manifest, write_manifest
from ogpsa_jax.training.checkpoints import Checkpoints


def state(step):
    return {"a": jnp.arange(5000.0) + step, "b": {"c": jnp.full((3, 7), step, jnp.bfloat16)}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two checkpoints, of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("written") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def restored(folder):
    checkpoints = Checkpoints(folder, keep=2)
    try:
        return checkpoints.restore_newest(state(0))
    finally:
        checkpoints.close()


def test_what_was_written_is_used(folder):
    step, found = restored(folder)
    assert step == 2
    np.testing.assert_array_equal(found["a"], state(2)["a"])


def test_a_manifest_names_every_file_that_holds_state(written):
    for step in (1, 2):
        names = {p.name for p in (written / str(step)).rglob("*") if p.is_file()}
        manifest = (written / str(step) / MANIFEST).read_text()
        unnamed = {name for name in names if f'{name}"' not in manifest}
        assert unnamed <= {MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}


def test_a_flipped_bit_anywhere_is_noticed(folder, caplog):
    """Every file in turn, at a place drawn by a fixed seed; the checkpoint before is used."""
    draw = random.Random(0)
    for path in sorted(p for p in (folder / "2").rglob("*") if p.is_file()):
        if path.name in ("_CHECKPOINT_METADATA", "commit_success.txt") or not path.stat().st_size:
            continue
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        flipped = folder.parent / "flipped"
        shutil.copytree(folder, flipped)
        (flipped / path.relative_to(folder)).write_bytes(bytes(content))
        step, found = restored(flipped)
        if path.name == MANIFEST and step == 2:  # white space, or a letter of a key nobody reads
            np.testing.assert_array_equal(found["a"], state(2)["a"])
        else:
            assert step == 1, (path, place)
            np.testing.assert_array_equal(found["a"], state(1)["a"])
            assert (flipped.with_name("flipped-unreadable") / "2").is_dir()
            shutil.rmtree(flipped.with_name("flipped-unreadable"))
        shutil.rmtree(flipped)
    assert "is not what was written" in caplog.text


def test_folders_that_were_exchanged_are_noticed(folder):
    (folder / "1").rename(folder / "3")
    (folder / "2").rename(folder / "1")
    (folder / "3").rename(folder / "2")
    with pytest.raises(InputError, match="every checkpoint is torn"):
        restored(folder)


def test_a_checkpoint_without_a_manifest_is_not_used(folder, caplog):
    (folder / "2" / MANIFEST).unlink()
    assert restored(folder)[0] == 1
    assert f"it has no {MANIFEST}" in caplog.text


def test_a_manifest_says_what_is_wrong(tmp_path):
    for name, content in (("a", "one"), ("below/b", "two")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    write_manifest(tmp_path, {"step": 3})
    assert check_manifest(tmp_path, {"step": 3}) is None
    assert check_manifest(tmp_path, {"step": 4}) == "it is that of step 3, not 4"
    (tmp_path / "below/b").write_text("too")
    assert check_manifest(tmp_path, {"step": 3}) == "below/b is not what was written"
    (tmp_path / "below/b").write_text("longer")
    assert check_manifest(tmp_path, {"step": 3}) == "below/b has 6 bytes, not 3"
    (tmp_path / "below/b").unlink()
    assert check_manifest(tmp_path, {"step": 3}) == "below/b is missing"
    write_manifest(tmp_path, {})
    for name in ("../a", "/etc/hostname"):
        content = json.loads((tmp_path / MANIFEST).read_text())
        content["files"] = {name: {"bytes": 3, "sha256": ""}}
        (tmp_path / MANIFEST).write_text(json.dumps(content))
        assert check_manifest(tmp_path, {}) == f"{MANIFEST} names a file elsewhere"
    (tmp_path / MANIFEST).write_text("[]")
    assert check_manifest(tmp_path, {"step": 3}) == f"{MANIFEST} cannot be read"


@pytest.mark.parametrize("content", ["[1]", '{"item_handlers": 3}'])
def test_times_that_cannot_be_read_are_told_in_one_sentence(folder, content):
    (folder / "2" / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(InputError, match=r"_CHECKPOINT_METADATA cannot be read .*; move that"):
        restored(folder)
