"""A manifest of a folder's files, so that a changed byte is never used."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ogpsa_jax.files import write_whole

MANIFEST = "manifest.json"
_VERSION = 1


def write_manifest(folder: Path, about: dict[str, Any], leave_out: Collection[str] = ()) -> None:
    """Write ``manifest.json``: size and SHA-256 of every file below `folder`.

    Args:
      folder: complete but for the manifest.
      about: what the folder is; :func:`check_manifest` compares it.
      leave_out: names of files that others go on writing.
    """
    names = sorted(_names(folder) - set(leave_out))
    digests = _digests([folder / name for name in names])
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    content = {"version": _VERSION, **about, "files": files}
    write_whole(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def check_manifest(folder: Path, about: dict[str, Any]) -> str | None:
    """What is not as the manifest says, in a few words; None where everything is.

    Files that the manifest does not name are not looked at.

    Args:
      folder: with ``manifest.json`` in it.
      about: as it was written.

    Raises:
      OSError: a file cannot be read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in _items(content)}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, like those of earlier versions"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for key, value in about.items():
        if content.get(key) != value:
            return f"it is that of {key} {content.get(key)}, not {value}"
    if not files:
        return f"{MANIFEST} names no files"
    for name, (size, _) in files.items():
        path = folder / name
        if ".." in path.parts or not path.is_relative_to(folder):
            return f"{MANIFEST} names a file elsewhere"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    found = _digests([folder / name for name in files])
    for (name, (_, digest)), now in zip(files.items(), found, strict=True):
        if digest != now:
            return f"{name} is not what was written"
    return None


def _items(content: Any) -> list[tuple[str, Any]]:
    return list(content["files"].items())


def _names(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def _digests(paths: list[Path]) -> list[str]:
    """Of each file; several at a time, as hashing leaves Python to itself."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
