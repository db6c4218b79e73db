"""What the report reads of a run: one small record, and where to find it.

A results file is a JSON object whose key ``records`` lists :class:`ScoreRecord` objects; other keys
are free. The demonstration and ``ogpsa-jax evaluate`` both write one.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import write_whole
from ogpsa_jax.remote import check_local
from ogpsa_jax.validation import first_complaint

_LARGEST = 1e9  # scores are fractions
BASE = "base"  # the method of the model before alignment
NAIVE = "naive"  # the method without any protection: it pays the whole tax


def _finite(value: float) -> float:
    if not abs(value) < _LARGEST:  # and no NaN
        raise ValueError("must be a finite number")
    return value


def _name(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError("must be one line of printable text")
    return value


Name = Annotated[str, AfterValidator(_name)]
Finite = Annotated[float, AfterValidator(_finite)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cost(_Strict):
    """What a run spent."""

    training_samples: int = Field(
        default=0,
        ge=0,
        lt=10**18,
        description="sequences through forward and backward passes; a pair is two",
    )
    reference_samples: int = Field(
        default=0,
        ge=0,
        lt=10**18,
        description="sequences whose gradients made the basis; a pair is two",
    )
    seconds: float = Field(default=0.0, ge=0, lt=1e18, description="wall-clock time of training")


class ScoreRecord(_Strict):
    """The scores of one model: one point of the safety–utility figure, or one seed of a point."""

    label: Name = Field(description="the name shown; records that differ in seed alone share it")
    method: Name = Field(description="base, naive, ogpsa, mixing, ...; decides the colour")
    stage: Name = Field(description="what was done, as in sft, dpo, sft+dpo; decides the marker")
    seed: int = 0
    scores: dict[str, Finite] = Field(
        description="fractions: general, safety, over_refusal, benign_compliance, any others; a "
        "score that is measured otherwise has another name"
    )
    spread: dict[str, Finite] = Field(
        default_factory=dict,
        description="standard errors of scores over the items of this run, where measured",
    )
    definitions: dict[str, str] = Field(
        default_factory=dict,
        description="how each score was measured; only equal definitions share a column",
    )
    asked: dict[str, str] = Field(
        default_factory=dict,
        description="a digest of the chat template, and the tokens at which answers ended",
    )
    warnings: list[str] = Field(
        default_factory=list, description="what to mind before the scores are believed"
    )
    cost: Cost = Cost()


def write_scores(
    path: str | Path, records: Iterable[ScoreRecord], extra: dict[str, Any] | None = None
) -> None:
    """Write a results file, whole or not at all.

    Args:
      path: the JSON file.
      records: what goes under ``records``.
      extra: further keys of the file.
    """
    content = {**(extra or {}), "records": [record.model_dump() for record in records]}
    write_whole(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_scores(run: str | Path) -> list[ScoreRecord]:
    """The records of a run.

    Args:
      run: a results file, or a directory: its ``results.json``, else those of its evaluations
        (``evaluation/*/results.json``, or ``*/results.json``).

    Returns:
      The records in the order of the files. Several evaluations of one run are one record with
      the scores of all of them.

    Raises:
      InputError: no results there, or a record that is not as it must be.
    """
    check_local(run, "the run")
    path = Path(run)
    if not path.exists():
        raise InputError(f"{path}: no such run; give a run directory or a results.json.")
    if path.is_file():
        return _file_records(path)
    own = path / "results.json"
    scored = [*path.glob("evaluation/*/results.json"), *path.glob("*/results.json")]
    files = [own] if own.is_file() else sorted(scored)
    if not files:
        raise InputError(
            f"{path}: contains no results.json; score the run first with "
            f"`ogpsa-jax evaluate {path} --suite FILE`."
        )
    return _merged([record for file in files for record in _file_records(file)], path)


def check_definitions(records: Iterable[ScoreRecord]) -> None:
    """Refuse records in which a score of one name was measured in two ways.

    Raises:
      InputError: names the score, two of the records, and how each was measured.
    """
    first: dict[str, ScoreRecord] = {}
    for record in records:
        for name in record.scores:
            other = first.setdefault(name, record)
            here, there = (each.definitions.get(name, "not stated") for each in (record, other))
            if here != there:
                raise InputError(
                    f"report: the score {name} is not the same quantity in {other.label!r} "
                    f"({there}) and {record.label!r} ({here}); evaluate both with the same suite "
                    "and judge, or report them separately."
                )


def _file_records(path: Path) -> list[ScoreRecord]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise InputError(
            f"{path}: expected an object with a list `records`, as `ogpsa-jax evaluate` and "
            "`ogpsa-jax demo` write it."
        )
    records = []
    for number, item in enumerate(content["records"], start=1):
        try:
            records.append(ScoreRecord.model_validate(item))
        except ValidationError as error:
            said = first_complaint(error, ScoreRecord)
            raise InputError(
                f"{path}, record {number}: {said} Fix it or make the file again."
            ) from error
    return records


def _merged(records: list[ScoreRecord], where: Path) -> list[ScoreRecord]:
    """Join the scores of records that describe the same model.

    Raises:
      InputError: two evaluations that differ in a score of the same name.
    """
    joined: dict[tuple[str, str, str, int], ScoreRecord] = {}
    for record in records:
        key = (record.label, record.method, record.stage, record.seed)
        before = joined.get(key, record)
        for name in before.scores.keys() & record.scores.keys():
            if before.scores[name] != record.scores[name]:
                raise InputError(
                    f"{where}: its evaluations differ in the score {name} "
                    f"({before.scores[name]:.3f} and {record.scores[name]:.3f}); report the "
                    "results.json of one of them."
                )
        check_definitions([before, record])
        joined[key] = before.model_copy(
            update={
                "scores": {**before.scores, **record.scores},
                "spread": {**before.spread, **record.spread},
                "definitions": {**before.definitions, **record.definitions},
                "asked": _both(before.asked, record.asked),
                "warnings": list(dict.fromkeys([*before.warnings, *record.warnings])),
            }
        )
    return list(joined.values())


def _both(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    """How a model was asked in two evaluations whose scores are one record."""
    found = dict(first)
    for key, value in second.items():
        parts = found[key].split(" / ") if key in found else []
        found[key] = " / ".join(dict.fromkeys([*parts, value]))
    return found
