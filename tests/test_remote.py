"""Data and models at an address are read; results are never written to one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ogpsa_jax import cli
from ogpsa_jax.data import DataSource, read_records
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import make_folder
from ogpsa_jax.models.folders import resolve_folder, written_beside
from ogpsa_jax.remote import fetched, is_remote
from ogpsa_jax.runs import read_scores

ROW = {"prompt": "one and one?", "completion": "two"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store of objects in memory, and a cache of copies of its own."""
    monkeypatch.setenv("OGPSA_CACHE", str(tmp_path / "cache"))
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def write(store: Any, path: str, rows: list[dict[str, str]]) -> None:
    store.pipe(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


@pytest.mark.parametrize(
    "path, remote",
    [
        ("gs://bucket/a.jsonl", True),
        (Path("s3://bucket/folder"), True),
        ("memory://a", True),
        ("owner/name:subset", False),
        ("/data/a.jsonl", False),
        ("C:/data", False),
        ("runs/a:b/c", False),
    ],
)
def test_addresses_are_told_from_paths_and_hub_ids(path: str | Path, remote: bool) -> None:
    assert is_remote(path) == remote


def test_rows_at_an_address_are_read_and_read_again_when_they_change(store: Any) -> None:
    source = DataSource("memory://bucket/rows.jsonl")
    write(store, "/bucket/rows.jsonl", [ROW])
    assert len(read_records(source, "sft")[0]) == 1
    write(store, "/bucket/rows.jsonl", [ROW, ROW | {"prompt": "two and two?"}])
    assert len(read_records(source, "sft")[0]) == 2


def test_a_bad_row_is_named_by_its_address(store: Any) -> None:
    write(store, "/bucket/rows.jsonl", [ROW, {"prompt": "one?"}])
    with pytest.raises(InputError, match=r"^memory://bucket/rows\.jsonl, line 2"):
        read_records(DataSource("memory://bucket/rows.jsonl"), "sft")


def test_a_folder_at_an_address_is_copied_once(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "/bucket/set/train.jsonl", [ROW])
    write(store, "/bucket/set/more/train.jsonl", [ROW])
    first = fetched("memory://bucket/set", "data")
    assert sorted(p.relative_to(first).as_posix() for p in first.rglob("*.jsonl")) == [
        "more/train.jsonl",
        "train.jsonl",
    ]
    monkeypatch.setattr(type(store), "get_file", None)  # nothing may be copied again
    assert fetched(Path("memory://bucket/set"), "data") == first


def test_a_model_at_an_address_is_read(store: Any, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        store.pipe(f"/bucket/model/{name}", b"{}")
    folder = resolve_folder("memory://bucket/model")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_copy_that_was_interrupted_is_not_used(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(store, "/bucket/rows.jsonl", [ROW])

    def torn(self: Any, path: str, target: str) -> None:
        Path(target).write_text("{")
        raise OSError("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "get_file", torn)
        with pytest.raises(InputError, match=r"data: memory://.* cannot be read \(the connection"):
            fetched("memory://bucket/rows.jsonl", "data")
    assert list((tmp_path / "cache").iterdir()) == []
    assert json.loads(fetched("memory://bucket/rows.jsonl", "data").read_text()) == ROW


@pytest.mark.parametrize("address", ["memory://nowhere/rows.jsonl", "unheardof://bucket/rows"])
def test_an_address_that_cannot_be_read_is_refused_by_name(store: Any, address: str) -> None:
    with pytest.raises(InputError, match=rf"data: {address} cannot be read \(.+\); check the addr"):
        fetched(address, "data")


def test_results_are_not_written_to_an_address(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refused = r"gs://bucket/\w+ is an address, and runs and results lie on a local or mounted disk"
    with pytest.raises(InputError, match=refused):
        make_folder(Path("gs://bucket/report"))
    with pytest.raises(InputError, match=refused), written_beside(Path("gs://bucket/export")):
        pass
    with pytest.raises(InputError, match=refused):
        read_scores("gs://bucket/run")
    assert cli.main(["export", "run", "gs://bucket/export"]) == 2
    assert list(tmp_path.iterdir()) == []
