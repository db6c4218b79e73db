"""Data and models at an address such as ``gs://bucket/folder``, which fsspec reads.

A local copy is made once and used as long as the files at the address stay the same. What a run
writes stays on a local or mounted disk: a lock, an appended log and an atomic rename, which exact
resume is built on, are not there in object stores.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ogpsa_jax.errors import InputError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has lost the second slash
_ONE_SLASH = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+:)/(?!/)")
_MARKS = ("etag", "ETag", "md5Hash", "checksum", "mtime", "LastModified", "updated", "created")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address (``gs://bucket/data.jsonl``) and no local path."""
    return _ADDRESS.match(os.fspath(path)) is not None


def _with_two_slashes(address: str | os.PathLike[str]) -> str:
    """As it was written, before it was taken for a path."""
    return _ONE_SLASH.sub(r"\1//", os.fspath(address))


def check_local(path: str | os.PathLike[str], name: str) -> None:
    """Refuse an address for a run or for results.

    Args:
      path: what was given.
      name: of the setting or option, for the message.

    Raises:
      InputError: it is an address.
    """
    if is_remote(path):
        raise InputError(
            f"{name}: {_with_two_slashes(path)} is an address, and runs and results lie on a local "
            "or mounted disk; mount the bucket, or use a local folder and copy it."
        )


def fetched(address: str | os.PathLike[str], name: str) -> Path:
    """A local copy of the file or folder at an address.

    Copies lie in ``$OGPSA_CACHE``, by default ``~/.cache/ogpsa_jax``.

    Args:
      address: what fsspec understands.
      name: of the setting or option, for the message.

    Raises:
      InputError: nothing there, or fsspec cannot reach it.
    """
    import fsspec

    address = _with_two_slashes(address)
    try:
        system, root = fsspec.core.url_to_fs(address)
        found = system.find(root, detail=True)
        if not found:
            raise FileNotFoundError("nothing is there")
        marks = [
            (path, info.get("size"), *(str(info.get(mark)) for mark in _MARKS))
            for path, info in sorted(found.items())
        ]
        digest = hashlib.sha256(repr((address, marks)).encode()).hexdigest()[:32]
        copy = _cache() / digest / (root.rstrip("/").rpartition("/")[2] or "root")
        if not copy.exists():
            copy.parent.parent.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(dir=copy.parent.parent))
            try:
                _copy(system, root, list(found), beside / copy.name)
                with contextlib.suppress(OSError):  # another process was faster
                    beside.rename(copy.parent)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        return copy
    except InputError:
        raise
    except Exception as error:  # of whatever package serves the address
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{name}: {address} cannot be read ({reason.rstrip('.')}); check the address, the "
            "credentials, and that the package for this kind of address is installed."
        ) from None


def _copy(system: Any, root: str, paths: list[str], target: Path) -> None:
    for path in paths:
        inside = path.removeprefix(root).strip("/")
        local = target / inside if inside else target
        if not local.resolve().is_relative_to(target.resolve()):
            raise InputError(f"{path}: names a file outside its folder.")
        local.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(path, str(local))


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ogpsa_jax"
    return Path(os.environ.get("OGPSA_CACHE", default))
