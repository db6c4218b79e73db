"""Arrays that are computed once and cached, in files that are complete or absent."""

import contextlib
import logging
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


def cache_folder(kind: str) -> Path:
    """Where things of a kind are kept: ``$XDG_CACHE_HOME/ogpsa_jax/KIND``."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "ogpsa_jax" / kind


def read_arrays(path: Path, right: Callable[[Arrays], bool]) -> Arrays | None:
    """The arrays of a file; None if it, or another process's copy, is missing or damaged.

    Args:
      path: the file.
      right: whether arrays are those that are looked for; it may fail on others.
    """
    found = None
    with contextlib.suppress(
        AttributeError, OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile
    ):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if right(arrays):
            found = arrays
    if jax.process_count() > 1:
        # All compute, or none does: computing takes every process.
        all_have = np.asarray(multihost_utils.process_allgather(np.asarray(found is not None)))
        if not all_have.all():
            return None
    return found


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Complete or invisible; the run continues without a file that cannot be written.

    Args:
      path: the file; the first process writes it.
      arrays: by name.
      what: they are, for the warning.
    """
    if jax.process_index() > 0:
        return
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        logger.warning("%s: %s are not kept (%s)", path.parent, what, error)
