"""Rows of local files and folders or of a hub data set, each with its place."""

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ogpsa_jax.data.records import DataSource
from ogpsa_jax.errors import InputError
from ogpsa_jax.remote import fetched, is_remote

Located = tuple[dict[str, Any], str]  # a row and where it stands

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
_UNREAD = (
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tsv", ".arrow", ".ndjson", ".feather"),
    *(".xlsx", ".xls", ".ods", ".pkl", ".pickle", ".sqlite", ".db", ".avro", ".orc"),
)
# Files about a data set, by their names.
_ABOUT = re.compile(
    r"(readme|licen[sc]e|copying|copyright|notice|authors|citation|changelog|changes|contributing|"
    r"requirements|manifest|metadata|state|config|package|dataset_infos?|dataset_dict)([-_. ]|$)",
    re.IGNORECASE,
)
_KEYWORD = re.compile(
    r"(?<![^-_. ])(train|test|val|valid|validation|dev|eval)(?:ing|set)?(?=[-_. \d]|$)",
    re.IGNORECASE,
)
_SHARD = re.compile(r"([-_. ]?(part|shard|chunk)?[-_. ]?\d+([-_]of[-_]\d+)?)+$", re.IGNORECASE)
_ROW = re.compile(r"(, row \d+)?(, line \d+)?$")  # of a place
_SPACE = re.compile(r"[ \t\r\n]*")
_BEYOND = "nested too deeply, or a number of too many digits; fix the row."


def located_rows(source: DataSource) -> list[Located]:
    """All rows of the named split.

    Raises:
      InputError: nothing there, unreadable, or not rows.
    """
    if is_remote(source.path):
        copy = str(fetched(source.path, "data"))
        try:
            rows = located_rows(replace(source, path=copy))
        except InputError as error:
            raise InputError(str(error).replace(copy, source.path)) from error
        return [(row, where.replace(copy, source.path)) for row, where in rows]
    path = Path(source.path)
    split = source.split.partition("[")[0]
    if path.is_dir():
        return _folder_rows(path, split)
    if path.exists():
        if split != "train" and not path.stem.startswith(split):
            raise InputError(
                f"{path}: a single file has no split '{split}'; leave it out, or slice it as "
                "train[90%:]."
            )
        return _file_rows(path)
    if path.suffix in _SUFFIXES or path.is_absolute() or source.path.startswith("."):
        raise InputError(f"{path}: no such file; correct the path in the configuration.")
    return _hub_rows(source.path, split)


def _folder_rows(path: Path, split: str) -> list[Located]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved_rows(path, split)
    data = [p for p in sorted(path.rglob("*")) if _may_have_rows(p, path)]
    files = [p for p in data if p.suffix.lower() in _SUFFIXES]
    if unread := next((p for p in data if p.suffix.lower() in _UNREAD), None):
        raise InputError(
            f"{path}: the folder contains {unread.name}, which cannot be read; unpack or "
            f"convert it to one of {', '.join(_SUFFIXES)}, or name the file to read."
        )
    if not files:
        raise InputError(f"{path}: the folder contains no {', '.join(_SUFFIXES)} file with data.")
    chosen = _files_of_split(files, path, split)
    texts = [p for p in chosen if p.suffix.lower() == ".txt"]
    if texts and len(texts) < len(chosen):
        raise InputError(
            f"{path}: the folder contains both text files ({texts[0].name}) and rows "
            f"({next(p.name for p in chosen if p not in texts)}); name the file to read."
        )
    kinds: dict[Path, Path] = {}
    for file in chosen:
        if (other := kinds.setdefault(file.with_suffix(""), file)) != file:
            raise InputError(
                f"{path}: the folder contains both {other.name} and {file.name}, which may be the "
                "same rows; name the file to read."
            )
    return [row for file in chosen for row in _file_rows(file)]


def _may_have_rows(file: Path, folder: Path) -> bool:
    """Whether a file may contain rows: it is not hidden, nor about the folder (README, LICENSE)."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and not _ABOUT.match(file.stem)


def _files_of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files of a split, by their names.

    Raises:
      InputError: there are none, or those of several splits whose names begin alike.
    """
    splits = {file: _split_of(file, folder) for file in files}
    found = [file for file in files if splits[file] == split]
    if not found:  # `train` is that of train_sft, if there is no other
        found = [f for f in files if split in _KEYWORD.findall(splits[f])]
    if not found and split == "train" and not any(splits.values()):
        return files
    names = sorted({splits[file] for file in found or files} - {""})
    if len(found) == 0:
        raise InputError(
            f"{folder}: no file of split '{split}'; the folder contains "
            f"{', '.join(p.name for p in files[:8])}."
        )
    if len(names) > 1:
        raise InputError(
            f"{folder}: '{split}' may be any of the splits {', '.join(names)}; name one of them."
        )
    return found


def _split_of(file: Path, folder: Path) -> str:
    """The split in a file's name, or in its folder's; empty if neither contains one."""
    for name in (file.stem, *reversed(file.relative_to(folder).parent.parts)):
        if _KEYWORD.search(name):
            return _SHARD.sub("", name)
    return ""


def mixed_files(places: Iterable[str], folder: str) -> list[str]:
    """The files of a folder that some rows come from, if they are not the parts of one file.

    Args:
      places: of the rows, as :func:`located_rows` gives them.
      folder: the path of the source.
    """
    files = [Path(name) for name in dict.fromkeys(_ROW.sub("", place) for place in places)]
    files = [file for file in files if Path(folder) in file.parents and file.suffix != ".txt"]
    parts = {(file.parent, _SHARD.sub("", file.stem)) for file in files}
    return [str(file.relative_to(folder)) for file in files] if len(parts) > 1 else []


def _file_rows(path: Path) -> list[Located]:
    kind = path.suffix.lower()
    if kind not in _SUFFIXES:
        raise InputError(
            f"{path}: files of this kind are not read; expected one of {', '.join(_SUFFIXES)}."
        )
    if kind == ".parquet":
        return _parquet_rows(path)
    content = content_of(path)
    if kind == ".txt":
        return [({"text": content}, str(path))]
    if kind == ".csv":
        return csv_rows(content, path)
    return [(_row(value, where), where) for value, where in json_values(content, path)]


def content_of(path: Path) -> str:
    """The text of a file.

    Raises:
      InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8."
        ) from error


def _parquet_rows(path: Path) -> list[Located]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable Parquet file ({reason}).") from error
    return [(row, f"{path}, row {i}") for i, row in enumerate(table.to_pylist(), start=1)]


def csv_rows(content: str, path: Path) -> list[Located]:
    """The rows of a CSV file with a header, each with its line.

    Raises:
      InputError: not CSV, a row that does not fit the header, or a column that stands twice.
    """
    # A field may be as long as the file; Python's own limit is 131,072 characters.
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    located: list[Located] = []
    try:
        line = reader.line_num + 1 if reader.fieldnames else 1
        header = list(reader.fieldnames or ())
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{path}, line 1: the column '{twice}' appears twice; rename one.")
        for row in reader:
            where = f"{path}, line {line}"
            if None in row or None in row.values():
                raise InputError(
                    f"{where}: the row has another number of fields than the header; fix it."
                )
            located.append((row, where))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from error
    return located


def json_values(content: str, path: Path) -> list[tuple[Any, str]]:
    """The items of a list in a .json file, or the values of JSON Lines, each with its place.

    Raises:
      InputError: not JSON, or a key that stands twice in an object.
    """
    if path.suffix.lower() == ".json" and content[_space(content, 0) :][:1] == "[":
        return _array_items(content, path)
    return _line_values(content, path)


def _array_items(content: str, path: Path) -> list[tuple[Any, str]]:
    """The items of a JSON array, one decoded at a time so that each one's line is known."""
    decode = json.JSONDecoder(object_pairs_hook=_once).raw_decode
    at = _space(content, _space(content, 0) + 1)
    line, counted = 1, 0
    located: list[tuple[Any, str]] = []
    try:
        done = content[at : at + 1] == "]"
        while not done:
            line, counted = line + content.count("\n", counted, at), at
            item, at = decode(content, at)
            located.append((item, f"{path}, row {len(located) + 1}, line {line}"))
            at = _space(content, at)
            done = content[at : at + 1] == "]"
            if not done and content[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", content, at)
            at = at if done else _space(content, at + 1)
        if (rest := _space(content, at + 1)) != len(content):
            raise json.JSONDecodeError("Extra data", content, rest)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg}; fix the file."
        ) from error
    except _Twice as error:
        raise InputError(f"{path}, line {line}: {error}") from None
    except (RecursionError, ValueError):
        raise InputError(f"{path}, line {line}: {_BEYOND}") from None
    return located


def _line_values(content: str, path: Path) -> list[tuple[Any, str]]:
    located = []
    # Only a newline ends a row: str.splitlines would also cut at U+2028 inside a text.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            located.append((parse_json(line, where), where))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not valid JSON: {error.msg}; expected one row ({{...}}) on each line, "
                "or, in a .json file, a list of rows."
            ) from error
    return located


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
      json.JSONDecodeError: it is not JSON.
      InputError: a key that stands twice, or something that Python does not read.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError:
        raise
    except _Twice as error:
        raise InputError(f"{where}: {error}") from None
    except (RecursionError, ValueError):
        raise InputError(f"{where}: {_BEYOND}") from None


class _Twice(ValueError):
    """A key that appears twice in one object; JSON does not define which of the two counts."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Twice(f"the key '{twice}' appears twice; keep one of them.")
    return found


def _space(content: str, at: int) -> int:
    """Where white space that begins at a position ends."""
    match = _SPACE.match(content, at)
    return match.end() if match else at


def _row(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(
            f"{where}: a row must be an object ({{...}}), found {type(item).__name__}; fix or "
            "remove the row."
        )
    return item


def _saved_rows(path: Path, split: str) -> list[Located]:
    """What ``datasets.save_to_disk`` wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds
        raise InputError(
            f"{path}: this saved data set cannot be loaded ({_reason(error)})."
        ) from error
    splits = list(found) if isinstance(found, dict) else [str(found.split), "train"]
    if split not in splits:
        raise InputError(
            f"{path}: this saved data set has no split '{split}'; it has {', '.join(splits)}."
        )
    rows = found[split] if isinstance(found, dict) else found
    return [(row, f"{path}, row {i}") for i, row in enumerate(rows, start=1)]


def _hub_rows(name: str, split: str) -> list[Located]:
    import datasets

    repository, _, subset = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, subset or None, split=split)
    except Exception as error:  # whatever the hub, the network or a loader raises
        raise InputError(
            f"{name}: neither a local file or folder nor a hub data set whose split '{split}' "
            f"could be loaded ({_reason(error)}); check the path."
        ) from error
    return [(row, f"{name}, row {i}") for i, row in enumerate(rows, start=1)]


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
