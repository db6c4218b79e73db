"""From a source to records: its rows, the part of them that is asked for, each one validated."""

import re
from collections.abc import Sequence

import numpy as np

from ogpsa_jax.data.files import Located, located_rows
from ogpsa_jax.data.formats import reader_for
from ogpsa_jax.data.records import DataSource, Kind, Record
from ogpsa_jax.errors import InputError

_SLICE = re.compile(r"^[^\[\]]+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?$")
_TOLD = 5  # malformed rows that one message names


def read_records(source: DataSource, kind: Kind) -> tuple[list[Record], int]:
    """All records of a source, validated; `source.samples` is not applied here.

    Args:
      source: what to read.
      kind: ``"sft"`` or ``"preference"``.

    Returns:
      The records, in file order, and the number of rows that the format itself says do not count.

    Raises:
      InputError: unreadable, of no known format, malformed rows, or no usable row at all.
    """
    bounds, by_prompt = _slice(source)
    located = located_rows(source)
    if not located:
        raise InputError(
            f"{source.path}: split '{source.split}' holds no row; name another split or file, or "
            "leave the source out."
        )
    if not by_prompt:
        located = located[slice(*_within(bounds, len(located), source, "rows"))]
    records = _read(located, source, kind)
    skipped = len(located) - len(records)
    if by_prompt:
        prompts = list(dict.fromkeys(record.prompt for record in records))
        chosen = set(prompts[slice(*_within(bounds, len(prompts), source, "prompts"))])
        records = [record for record in records if record.prompt in chosen]
    if not records:
        raise InputError(
            f"{source.path}: split '{source.split}' holds no usable row; its format says of all "
            f"{skipped} of them that they do not count."
        )
    return records, skipped


def split_by_prompt(
    records: Sequence[Record], fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split records so that rows with the same prompt fall on the same side.

    Args:
      records: of any kind.
      fraction: of the *prompts* that go to the second part, between 0 and 1.
      seed: of the draw.

    Returns:
      (the rest, the drawn part), each in the given order.

    Raises:
      ValueError: a fraction outside 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie between 0 and 1, found {fraction}")
    prompts = list(dict.fromkeys(record.prompt for record in records))
    order = np.random.default_rng(seed).permutation(len(prompts))
    drawn = {prompts[i] for i in order[: round(fraction * len(prompts))]}
    return (
        [record for record in records if record.prompt not in drawn],
        [record for record in records if record.prompt in drawn],
    )


def _read(located: list[Located], source: DataSource, kind: Kind) -> list[Record]:
    reader = reader_for([row for row, _ in located[:1]], kind, source.format, source.path)
    records: list[Record] = []
    malformed: list[tuple[str, str]] = []
    columns = list(located[0][0])
    for row, where in located:
        try:
            record = reader(row, where)
        except InputError as error:
            problem = str(error).removesuffix(".")
            if source.format == "auto" and set(row) != set(columns):
                problem += (
                    f"; the format was taken from the first row, whose columns are "
                    f"{', '.join(map(str, columns))}: rows of another one need a file of their own"
                )
            malformed.append((problem, where))
            continue
        if record is not None:
            records.append(record)
    if malformed:
        others = and_others([where for _, where in malformed[1:]])
        raise InputError(f"{malformed[0][0]}{others}.")
    return records


def and_others(places: Sequence[str]) -> str:
    """`` (and 7 rows more: line 3, line 8, …)``, or nothing where there are none."""
    if not places:
        return ""
    named = ", ".join(place.rpartition(", ")[2] for place in places[:_TOLD])
    more = ", …" if len(places) > _TOLD else ""
    return f" (and {len(places)} row{'s' * (len(places) > 1)} more: {named}{more})"


def _slice(source: DataSource) -> tuple[tuple[str | None, str | None], bool]:
    """The slice's bounds as written, and whether they count prompts."""
    match = _SLICE.match(source.split)
    bounds = (match[1], match[2]) if match else (None, None)
    kinds = {bound.endswith("%") for bound in bounds if bound}
    if match is None or len(kinds) > 1:
        raise InputError(
            f"{source.path}: split '{source.split}' is not understood; write a name and perhaps a "
            "slice, as in train[:2000] or train[90%:]."
        )
    return bounds, kinds == {True}


def _within(
    bounds: tuple[str | None, str | None], size: int, source: DataSource, what: str
) -> tuple[int, int]:
    """The bounds as numbers between 0 and `size`."""
    found = []
    for bound, default in zip(bounds, (0, size), strict=True):
        if not bound:
            found.append(default)
            continue
        number = round(size * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
        found.append(number + size if bound.startswith("-") else number)
    first, last = found
    if not 0 <= first < last <= size:
        raise InputError(
            f"{source.path}: split '{source.split}' asks for {what} that are not there; the data "
            f"holds {size}."
        )
    return first, last
