"""Reading rows: local files and folders, or a hub id through ``datasets``; then records."""

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ogpsa_jax.data.formats import reader_for
from ogpsa_jax.data.records import DataSource, Kind, Record
from ogpsa_jax.errors import InputError

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")
_SPLIT = re.compile(r"^(?P<name>[^\[]+)(?:\[(?P<start>\d*%?):(?P<stop>\d*%?)\])?$")
Located = tuple[dict[str, Any], str]  # a row and where it stands


def read_records(source: DataSource, kind: Kind, seed: int) -> list[Record]:
    """All records of a source, validated.

    Args:
      source: what to read.
      kind: ``"sft"`` or ``"preference"``.
      seed: draws `source.samples` rows, where fewer than all are asked for.

    Returns:
      The records, in file order.

    Raises:
      InputError: unreadable, of no known format, a malformed row, no row at all, or fewer rows than
        asked for.
    """
    located = _sliced(_rows(source), source)
    reader = reader_for([row for row, _ in located], kind, source.format, source.path)
    records = [record for row, where in located if (record := reader(row, where)) is not None]
    if not records:
        raise InputError(f"{source.path}: split '{source.split}' holds no usable row.")
    if source.samples is None:
        return records
    if source.samples > len(records):
        raise InputError(
            f"{source.path}: {source.samples} samples asked for, but split '{source.split}' holds "
            f"{len(records)} usable rows; ask for at most {len(records)}."
        )
    drawn = np.random.default_rng(seed).permutation(len(records))[: source.samples]
    return [records[i] for i in sorted(drawn)]


def split_by_prompt(
    records: Sequence[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split records so that rows with the same prompt fall on the same side.

    Args:
      records: of any kind.
      fraction: of the *prompts* that go to the second part.
      seed: of the draw.

    Returns:
      (the rest, the drawn part), each in the given order.
    """
    prompts = list(dict.fromkeys(record.prompt for record in records))
    order = np.random.default_rng(seed).permutation(len(prompts))
    drawn = {prompts[i] for i in order[: round(fraction * len(prompts))]}
    return (
        [record for record in records if record.prompt not in drawn],
        [record for record in records if record.prompt in drawn],
    )


def _rows(source: DataSource) -> list[Located]:
    path = Path(source.path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _SUFFIXES)
        name = source.split.partition("[")[0]
        named = [p for p in files if p.stem.startswith(name)]
        if not files:
            raise InputError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file.")
        return [row for file in named or files for row in _file_rows(file)]
    if path.exists():
        return _file_rows(path)
    if path.suffix in _SUFFIXES or path.is_absolute() or source.path.startswith("."):
        raise InputError(f"{path}: no such file; correct the path in the configuration.")
    return _hub_rows(source)


def _file_rows(path: Path) -> list[Located]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable Parquet file ({error}).") from error
        return [(row, f"{path}, row {i + 1}") for i, row in enumerate(table.to_pylist())]
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}).") from error
    if path.suffix == ".txt":
        return [({"text": content}, str(path))]
    if path.suffix == ".csv":
        rows = csv.DictReader(content.splitlines(keepends=True))
        return [(row, f"{path}, line {rows.line_num}") for row in rows]
    if path.suffix == ".json" and content.lstrip().startswith("["):
        try:
            items = json.loads(content)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {error.lineno}: not valid JSON: {error.msg}."
            ) from error
        return [_checked(item, f"{path}, row {i + 1}") for i, item in enumerate(items)]
    located = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            located.append(_checked(json.loads(line), where))
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON: {error.msg}; mend the line.") from error
    return located


def _checked(item: Any, where: str) -> Located:
    if not isinstance(item, dict):
        raise InputError(f"{where}: a row must be an object, found {type(item).__name__}.")
    return item, where


def _hub_rows(source: DataSource) -> list[Located]:
    import datasets

    name = source.split.partition("[")[0]
    try:
        rows = datasets.load_dataset(source.path, split=name)
    except Exception as error:  # whatever the hub, the network or a loader raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{source.path}: neither a local file or folder nor a hub data set that could be "
            f"loaded ({reason}); check the path."
        ) from error
    return [(dict(row), f"{source.path}, row {i + 1}") for i, row in enumerate(rows)]


def _sliced(located: list[Located], source: DataSource) -> list[Located]:
    match = _SPLIT.match(source.split)
    if match is None:
        raise InputError(
            f"{source.path}: split '{source.split}' is not understood; write a name and perhaps a "
            "slice, as in train[:2000] or train[90%:]."
        )

    def position(text: str | None, default: int) -> int:
        if not text:
            return default
        if text.endswith("%"):
            return round(len(located) * int(text[:-1]) / 100)
        return int(text)

    chosen = located[position(match["start"], 0) : position(match["stop"], len(located))]
    if not chosen:
        raise InputError(
            f"{source.path}: split '{source.split}' is empty; the data has {len(located)} rows."
        )
    return chosen
