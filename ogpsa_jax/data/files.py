"""Rows out of local files and folders, or out of a hub data set, each with the place it stands."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from ogpsa_jax.data.records import DataSource
from ogpsa_jax.errors import InputError

Located = tuple[dict[str, Any], str]  # a row and where it stands

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json")
_SPLITS = re.compile(r"^(train|test|val|valid|validation|dev|eval)(?=[-_.]|$)")  # of file names
_SPACE = re.compile(r"[ \t\r\n]*")
_BEYOND = "nested too deeply, or a number of too many digits; mend the row."


def located_rows(source: DataSource) -> list[Located]:
    """All rows of the named split.

    Raises:
      InputError: nothing there, unreadable, or not rows.
    """
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
    files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES and p.name not in _METADATA)
    if not files:
        raise InputError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file.")
    named = [p for p in files if re.split("[-.]", p.stem)[0] == split]  # train-00000-of-00002
    named = named or [p for p in files if p.stem.startswith(f"{split}_")]
    if not named and (split != "train" or any(_SPLITS.match(p.stem) for p in files)):
        raise InputError(
            f"{path}: no file of split '{split}'; the folder holds "
            f"{', '.join(p.name for p in files[:8])}."
        )
    return [row for file in named or files for row in _file_rows(file)]


def _file_rows(path: Path) -> list[Located]:
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"{path}: files of this kind are not read; expected one of {', '.join(_SUFFIXES)}."
        )
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    content = _content(path)
    if path.suffix == ".txt":
        return [({"text": content}, str(path))]
    if path.suffix == ".csv":
        return csv_rows(content, path)
    if path.suffix == ".json" and content[_space(content, 0) :][:1] == "[":
        return _json_rows(content, path)
    return _json_lines_rows(content, path)


def _content(path: Path) -> str:
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
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    located: list[Located] = []
    try:
        line = reader.line_num + 1 if reader.fieldnames else 1
        header = list(reader.fieldnames or ())
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise InputError(
                f"{path}, line 1: the column '{twice}' stands there twice; rename one."
            )
        for row in reader:
            where = f"{path}, line {line}"
            if None in row or None in row.values():
                raise InputError(
                    f"{where}: the row has not as many fields as the header; mend the row."
                )
            located.append((row, where))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV: {error}.") from error
    return located


def _json_rows(content: str, path: Path) -> list[Located]:
    """The rows of a JSON array, one decoded at a time so that each one's line is known."""
    decode = json.JSONDecoder(object_pairs_hook=_once).raw_decode
    at = _space(content, _space(content, 0) + 1)
    line, counted = 1, 0
    located: list[Located] = []
    try:
        done = content[at : at + 1] == "]"
        while not done:
            line, counted = line + content.count("\n", counted, at), at
            item, at = decode(content, at)
            where = f"{path}, row {len(located) + 1}, line {line}"
            located.append((_row(item, where), where))
            at = _space(content, at)
            done = content[at : at + 1] == "]"
            if not done and content[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", content, at)
            at = at if done else _space(content, at + 1)
        if (rest := _space(content, at + 1)) != len(content):
            raise json.JSONDecodeError("Extra data", content, rest)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON: {error.msg}; mend the file."
        ) from error
    except InputError:
        raise
    except _Twice as error:
        raise InputError(f"{path}, line {line}: {error}") from None
    except (RecursionError, ValueError):
        raise InputError(f"{path}, line {line}: {_BEYOND}") from None
    return located


def _json_lines_rows(content: str, path: Path) -> list[Located]:
    located = []
    # Only a newline ends a row: str.splitlines would also cut at U+2028 inside a text.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = parse_json(line, where)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{where}: not valid JSON: {error.msg}; expected one row ({{...}}) on each line, "
                "or, in a .json file, a list of rows."
            ) from error
        located.append((_row(item, where), where))
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
    """A key that stands twice in one object; JSON leaves open which of the two counts."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Twice(f"the key '{twice}' stands there twice; keep one of them.")
    return found


def _space(content: str, at: int) -> int:
    """Where white space that begins at a position ends."""
    match = _SPACE.match(content, at)
    return match.end() if match else at


def _row(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise InputError(
            f"{where}: a row must be an object ({{...}}), found {type(item).__name__}; mend or "
            "remove the row."
        )
    return item


def _saved_rows(path: Path, split: str) -> list[Located]:
    """What ``datasets.save_to_disk`` wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
        rows = found[split] if isinstance(found, dict) else found
    except Exception as error:  # of many kinds
        raise InputError(
            f"{path}: split '{split}' of this saved data set cannot be loaded ({_reason(error)})."
        ) from error
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
