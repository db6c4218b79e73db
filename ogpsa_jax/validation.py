"""What pydantic finds wrong with the content of a file, as one sentence for people."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Location = tuple[str | int, ...]
_NO_MAPPING = ("model_type", "model_attributes_type", "dict_type")


def first_complaint(
    error: ValidationError, model: type[BaseModel], renamed: Mapping[str, str] | None = None
) -> str:
    """The complaint that says most, as a sentence.

    Args:
      error: of validating `model`.
      model: what was expected.
      renamed: how keys that are no longer known are written now.
    """
    detail = first_detail(error)
    location = plain_location(model, detail)
    key = ".".join(str(part) for part in location)
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    message = message[:1].lower() + message[1:]
    if detail["type"] == "extra_forbidden":
        if renamed and key in renamed:
            return f"'{key}' is now written {renamed[key]}."
        siblings = list(_section_of(model, detail["loc"]).model_fields)
        close = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.5)
        remedy = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(siblings)}."
        return f"unknown key '{key}'; {remedy}"
    if detail["type"] == "missing":
        section = _section_of(model, detail["loc"])
        field = section.model_fields.get(str(location[-1]))
        meaning = f" ({field.description})" if field is not None and field.description else ""
        return f"'{key}' is missing; add it{meaning}."
    if detail["type"] in _NO_MAPPING:
        message = "input should be keys with their values, as in {key: value}"
    given = detail["input"]
    shown = "" if isinstance(given, dict | list | BaseModel) else f", not {given!r}"
    return (f"'{key}': " if key else "") + f"{message}{shown}."


def first_detail(error: ValidationError) -> ErrorDetails:
    """A misspelt key is also a missing one: the unknown one says more."""
    complaints = error.errors()
    unknown = [detail for detail in complaints if detail["type"] == "extra_forbidden"]
    return (unknown or complaints)[0]


def plain_location(model: type[BaseModel], detail: ErrorDetails) -> Location:
    """Where the complaint is, as in the file: without the kinds that pydantic chose among."""
    steps = zip(detail["loc"], _walk(model, detail["loc"]), strict=True)
    return tuple(part for part, (_, is_tag) in steps if not is_tag)


def _section_of(model: type[BaseModel], location: Location) -> type[BaseModel]:
    """The section that contains the key at `location`."""
    section = model
    for found, _ in list(_walk(model, location))[:-1]:
        section = found or section
    return section


def _walk(
    model: type[BaseModel], location: Location
) -> Iterator[tuple[type[BaseModel] | None, bool]]:
    """For each part, the section it leads to, if any, and whether it is the tag of a union."""
    section, kinds = model, []  # type: ignore[var-annotated]
    for part in location:
        tagged = [kind for kind in kinds if part in _tags(kind)]
        if tagged:
            section, kinds = tagged[0], []
            yield section, True
            continue
        field = section.model_fields.get(str(part))
        if field is not None:
            kinds = _sections(field.annotation)
            section = kinds[0] if len(kinds) == 1 else section
        yield section, False


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """All sections in a type such as ``tuple[A | B, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections(part)]


def _tags(section: type[BaseModel]) -> tuple[Any, ...]:
    """The values of the field ``kind`` that make a mapping this section."""
    kind = section.model_fields.get("kind")
    return get_args(kind.annotation) if kind is not None else ()
