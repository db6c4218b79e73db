"""From a source to records: its rows, or the requested part of them, each one validated."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ogpsa_jax.data import fields
from ogpsa_jax.data.files import Located, located_rows, mixed_files
from ogpsa_jax.data.formats import PROMPT_ALONE, REMEDY, Format, asks_alone, format_of
from ogpsa_jax.data.records import DataSource, Kind, Record, Row, Skipped
from ogpsa_jax.errors import InputError

_SLICE = re.compile(r"^[^\[\]]+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?$")
_TOLD = 5  # malformed rows that one message names
_NAMED = 12  # unused fields that one message names


class ReadRows(NamedTuple):
    """The content of a source.

    Attributes:
      records: in file order.
      skipped: how many rows say that they do not count, by the way they say it.
      notes: sentences on what of the rows is not used.
    """

    records: list[Record]
    skipped: Counter[str]
    notes: list[str]


def read_records(source: DataSource, kind: Kind, *, prompts_alone: bool = False) -> ReadRows:
    """All records of a source, validated; `source.samples` is not applied here.

    Args:
      source: what to read.
      kind: ``"sft"`` or ``"preference"``.
      prompts_alone: whether rows without an answer may be among them (SFT only).

    Raises:
      InputError: unreadable, of no known format, malformed rows, or no usable row at all.
    """
    bounds, by_prompt = _slice(source)
    located = located_rows(source)
    if not located:
        raise InputError(
            f"{source.path}: split '{source.split}' has no row; name another split or file, or "
            "remove the source."
        )
    if not by_prompt:
        located = located[slice(*_within(bounds, len(located), source, "rows"))]
    records, skipped, notes = _read(located, source, kind, prompts_alone)
    if by_prompt:
        prompts = list(dict.fromkeys(record.prompt for record in records))
        chosen = set(prompts[slice(*_within(bounds, len(prompts), source, "prompts"))])
        records = [record for record in records if record.prompt in chosen]
    if not records:
        raise InputError(
            f"{source.path}: split '{source.split}' has no usable row: {told_skipped(skipped)}; "
            "name another file or fix the rows."
        )
    return ReadRows(records, skipped, notes)


def told_skipped(skipped: Counter[str]) -> str:
    """``3 rows are skipped ('is_safe' says that the answer is bad: 2; …: 1)``."""
    rows = "1 row is" if skipped.total() == 1 else f"{skipped.total()} rows are"
    reasons = "; ".join(f"{reason}: {count}" for reason, count in skipped.most_common())
    return f"{rows} skipped ({reasons})"


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


def _read(located: list[Located], source: DataSource, kind: Kind, prompts_alone: bool) -> ReadRows:
    """The rows' records; all malformed ones are refused together."""
    known = _format(located, source, kind, prompts_alone)
    records: list[Record] = []
    skipped: Counter[str] = Counter()
    unused: dict[str, list[str]] = {}  # where each field stands
    rated: dict[str, list[float]] = {}
    malformed: list[tuple[str, str]] = []
    for row, where in located:
        try:
            alone = prompts_alone and asks_alone(row)
            found = _record(row, where, PROMPT_ALONE if alone else known, unused)
        except InputError as error:
            problem = str(error).removesuffix(".")
            if kind == "sft" and asks_alone(row) and not prompts_alone:
                problem += f"; {REMEDY}"
            elif source.format == "auto" and set(row) != set(located[0][0]):
                problem += (
                    f"; the format was taken from the first row, whose columns are "
                    f"{', '.join(map(str, located[0][0]))}: rows of another one need a file of "
                    "their own"
                )
            malformed.append((problem, where))
            continue
        if isinstance(found, Skipped):
            skipped[found.reason] += 1
            continue
        records.append(found)
        for column, rating in () if known.pair else fields.ratings(row).items():
            rated.setdefault(column, []).append(rating)
    if malformed:
        others = and_others([where for _, where in malformed[1:]])
        raise InputError(f"{malformed[0][0]}{others}.")
    files = mixed_files((where for _, where in located), source.path)
    return ReadRows(records, skipped, _notes(source.path, known.name, files, unused, rated))


def _notes(
    path: str,
    format_name: str,
    files: Sequence[str],
    unused: Mapping[str, Sequence[str]],
    rated: Mapping[str, Sequence[float]],
) -> list[str]:
    """What to say of files that are read together, of unused fields, and of ratings."""
    notes = []
    if files:
        told = ", ".join(files[:_TOLD]) + (f" and {len(files) - _TOLD} more" * (len(files) > _TOLD))
        notes.append(
            f"{path}: the rows of {told} are read together; name one of these files if it "
            "alone is meant"
        )
    if unused:
        told = ", ".join(
            f"'{name}' ({_how_many(places)})" for name, places in list(unused.items())[:_NAMED]
        )
        more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
        notes.append(
            f"{path}: the format {format_name} does not use {told}{more}; remove what says "
            "nothing of the prompt or the answer, and write the rest into them"
        )
    return notes + [
        f"{path}: '{column}' rates the answers from {min(found):g} to {max(found):g}, and "
        f"all {'above 0 ' if column in fields.RATINGS else ''}are trained on; leave those out of "
        "the file that must not be"
        for column, found in rated.items()
        if min(found) < max(found)
    ]


def _record(row: Row, where: str, known: Format, unused: dict[str, list[str]]) -> Record | Skipped:
    """The row's record; adds unknown fields to `unused`."""
    reason = fields.bad_pair(row, where) if known.pair else fields.bad_answer(row, where)
    if reason:
        return Skipped(reason)
    for name in fields.unused(row, where, known.name, known.uses, known.pair):
        unused.setdefault(name, []).append(where)
    return known.read(row, where)


def _how_many(places: Sequence[str]) -> str:
    """``line 2``, or ``3 rows, the first is line 2``."""
    first = places[0].rpartition(", ")[2]
    return first if len(places) == 1 else f"{len(places)} rows, the first is {first}"


def _format(located: list[Located], source: DataSource, kind: Kind, prompts_alone: bool) -> Format:
    """Of the rows with answers, where prompts alone may stand among them."""
    rows = (row for row, _ in located if not (prompts_alone and asks_alone(row)))
    first = next(rows, None)
    if first is None and source.format == "auto":
        return PROMPT_ALONE
    try:
        return format_of([] if first is None else [first], kind, source.format, source.path)
    except InputError as error:
        if kind == "sft" and first is not None and asks_alone(first):
            raise InputError(f"{str(error).removesuffix('.')}; {REMEDY}.") from error
        raise


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
            f"{source.path}: split '{source.split}' requests {what} that do not exist; the data "
            f"has {size}."
        )
    return first, last
