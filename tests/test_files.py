"""Folders that one process writes to."""

from pathlib import Path

import pytest
from filelock import FileLock

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import only_writer


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(InputError, match="another process is writing there"):
        only_writer(tmp_path).__enter__()
    with only_writer(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with only_writer(tmp_path):
        (tmp_path / "written").touch()
    assert f"{tmp_path}: cannot be locked (no flock here)" in caplog.text
