"""Reading and writing checkpoints of safetensors files, one tensor at a time.

Nothing else is ever read as weights: a safetensors file contains numbers and names, no code.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json
from ogpsa_jax.models.folders import UNROUNDED, WRITTEN, keeps_unrounded

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class CheckpointReader:
    """The tensors of a folder: ``model.safetensors``, or the files its index names.

    Args:
      folder: a Hugging Face model folder.
      single: the file that contains everything where there is one.

    Raises:
      InputError: there are no safetensors, a file the index names is missing, or one is not whole.
    """

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        self._stack = contextlib.ExitStack()
        self._files: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        index = folder / INDEX
        if (folder / single).is_file():
            self._add(folder / single, None)
        elif index.is_file():
            self._add_indexed(index)
        else:
            raise InputError(
                f"{folder}: neither {single} nor {INDEX} is there; give a folder with safetensors "
                "weights (other formats can execute code and are not read)."
            )

    def _add_indexed(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise InputError(f"{index}: weight_map must map tensor names to file names.")
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise InputError(f"{index}: {file!r} must be a file name within the folder.")
            path = index.parent / file
            if not path.is_file():
                raise InputError(f"{index}: names the file {file}, which is missing; fetch it.")
            self._add(path, {name for name, where in weight_map.items() if where == file})

    def _add(self, path: Path, expected: set[str] | None) -> None:
        try:
            file = self._stack.enter_context(safe_open(path, framework="numpy"))
            names = set(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path}: not a whole safetensors file ({error}); fetch or export it again."
            ) from None
        for name in sorted((expected or names) - names):
            raise InputError(f"{path}: tensor {name} is missing, but {INDEX} says it is there.")
        for name in names:
            if name in self._where:
                raise InputError(f"{path}: tensor {name} is also in {self._where[name].name}.")
            self._where[name] = path
        self._files[path] = file

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def file(self, name: str) -> Path:
        """The file a tensor is in."""
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Type of a tensor.

        Raises:
          InputError: it is not float32, float16 or bfloat16.
        """
        code = self._slice(name).get_dtype()
        if code not in DTYPES:
            raise InputError(
                f"{self.file(name)}: tensor {name} has type {code}, but weights must be F32, F16 "
                "or BF16."
            )
        return DTYPES[code]

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a block of it; only what is asked for is read."""
        part = self._slice(name)
        return np.asarray(part[index] if index else part[...] if part.get_shape() else part[:])

    def _slice(self, name: str) -> Any:
        return self._files[self._where[name]].get_slice(name)

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._stack.close()


class UnroundedReader(CheckpointReader):
    """The weights as trained, which an export that rounds them keeps beside the rounded ones.

    Each tensor that is read is compared with what the export rounded it to.

    Args:
      folder: the export.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / UNROUNDED)
        self._rounded = self._stack.enter_context(CheckpointReader(folder))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """A tensor, or a block of it.

        Raises:
          InputError: the export contains something else than this, rounded.
        """
        value, rounded = super().read(name, index), self._rounded.read(name, index)
        if not np.array_equal(value.astype(rounded.dtype), rounded, equal_nan=True):
            raise InputError(
                f"{self._rounded.file(name)}: tensor {name} is not what {self.file(name)} rounds "
                f"to, so one of the two was changed; delete {self.file(name).parent} and "
                f"{WRITTEN} to start from the former."
            )
        return value


def weights_reader(folder: Path) -> CheckpointReader:
    """The tensors of a model folder as they were trained: unrounded where it keeps them so.

    Raises:
      InputError: as :class:`CheckpointReader`; or unrounded weights that are gone.
    """
    return UnroundedReader(folder) if keeps_unrounded(folder) else CheckpointReader(folder)


class CheckpointWriter:
    """Writes tensors, announced beforehand, into safetensors files of limited size plus an index.

    The library's own writer wants all tensors of a file in memory at once; the format (a JSON
    header, then the bytes) lets them pass one by one.

    Args:
      folder: exists; files are made in it.
      tensors: name -> (dtype, shape), in the order in which they will be written.
      max_shard_bytes: largest size of a file; a single larger tensor gets a file of its own.
      single: file name when one file is enough.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        max_shard_bytes: int,
        single: str = SINGLE,
    ) -> None:
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
        self._folder = folder
        self._tensors = dict(tensors)
        self._shards = _cut(self._tensors, max_shard_bytes)
        self._single = single
        self._order = iter([(name, i) for i, names in enumerate(self._shards) for name in names])
        self._open: tuple[int, IO[bytes]] | None = None

    def _file_name(self, shard: int) -> str:
        if len(self._shards) == 1:
            return self._single
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def write(self, name: str, array: np.ndarray) -> None:
        """Append the next tensor.

        Raises:
          ValueError: it is not the one announced.
        """
        expected, shard = next(self._order, (None, -1))
        dtype_shape = (array.dtype, array.shape)
        if name != expected or self._tensors[name] != dtype_shape:
            announced = self._tensors.get(expected or "")
            raise ValueError(f"name must be {expected} with {announced}, got {name}: {dtype_shape}")
        if self._open is None or self._open[0] != shard:
            self._close_file()
            file = (self._folder / self._file_name(shard)).open("wb")
            self._open = (shard, file)
            file.write(_header({name: self._tensors[name] for name in self._shards[shard]}))
        self._open[1].write(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)

    def _close_file(self) -> None:
        if self._open is not None:
            file = self._open[1]
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._open = None

    def finish(self) -> None:
        """Close the last file and write the index.

        Raises:
          ValueError: announced tensors were not written.
        """
        missing = next(self._order, None)
        if missing is not None:
            raise ValueError(f"tensor {missing[0]} was announced but not written")
        self._close_file()
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(_size(*spec) for spec in self._tensors.values())},
                "weight_map": {
                    name: self._file_name(i)
                    for i, names in enumerate(self._shards)
                    for name in names
                },
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX).write_text(text, encoding="utf-8")

    def abort(self) -> None:
        """Close the open file without finishing it."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


@contextlib.contextmanager
def checkpoint_writer(
    folder: Path,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    max_shard_bytes: int,
    single: str = SINGLE,
) -> Iterator[CheckpointWriter]:
    """A :class:`CheckpointWriter` that is finished at the end, and closed whatever happens."""
    writer = CheckpointWriter(folder, tensors, max_shard_bytes, single)
    try:
        yield writer
        writer.finish()
    finally:
        writer.abort()


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def _cut(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_shard_bytes: int
) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        size = _size(*spec)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + _size(dtype, shape)
        entries[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return struct.pack("<Q", len(text)) + text
