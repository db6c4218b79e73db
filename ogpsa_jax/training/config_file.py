"""Reading a configuration: YAML, overrides from the command line, and errors that name the line."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import Yaml12Loader, expand_environment, line_of, read_yaml
from ogpsa_jax.training.config import RunConfig


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one YAML file, apply ``key.sub=value`` overrides, validate.

    ``${NAME}`` and ``${NAME:-default}`` in text values are replaced from the environment.

    Args:
      path: the YAML file.
      overrides: ``key.sub=value`` each; the value is YAML; list items are addressed by number.

    Returns:
      The resolved configuration.

    Raises:
      InputError: unreadable file, unknown key, wrong value; names file, line, key and remedy.
    """
    path = Path(path)
    raw, root = read_yaml(path, "configuration")
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected keys and values such as `objective: sft`.")
    overridden = {}
    for override in overrides:
        overridden[_apply_override(raw, override)] = override
    raw = expand_environment(raw, path)
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        complaints = error.errors()
        # A misspelt key is also a missing one: the unknown one says more.
        unknown = [detail for detail in complaints if detail["type"] == "extra_forbidden"]
        detail = (unknown or complaints)[0]
        raise InputError(_sentence(detail, path, root, overridden)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; :func:`load_config` gives the same one back."""
    return str(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def schema_lines(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """One line per key: name, type, default, meaning; for ``--help`` and the docs."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = next(
            (
                part
                for part in (kind, *getattr(kind, "__args__", ()))
                if isinstance(part, type) and issubclass(part, BaseModel)
            ),
            None,
        )
        is_list = getattr(kind, "__origin__", None) is tuple
        is_dict = getattr(kind, "__origin__", None) is dict
        if nested is not None:
            yield from schema_lines(
                nested, f"{prefix}{name}{'[]' if is_list else '{}' if is_dict else ''}."
            )
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = (
            "required"
            if field.is_required()
            else yaml.safe_dump(
                list(default) if isinstance(default, tuple) else default, default_flow_style=True
            )
            .removesuffix("\n...\n")
            .strip()
        )
        choices = getattr(kind, "__args__", ()) if "Literal" in str(kind) else ()
        names = [str(c) for c in choices if isinstance(c, str)]
        allowed = f" ({' | '.join(names)})" if names else ""
        yield f"{prefix}{name} [{shown}]{allowed}: {field.description}"


def _apply_override(raw: dict[str, Any], override: str) -> tuple[str | int, ...]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override '{override}': expected key.sub=value.")
    try:
        value = yaml.load(text, Loader=Yaml12Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"override '{override}': the value is not valid YAML; put text in quotes."
        ) from error
    steps: list[str | int] = [int(part) if part.isdecimal() else part for part in key.split(".")]
    at: Any = raw
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(at, list):
            if not isinstance(step, int) or step >= len(at):
                raise InputError(
                    f"override '{override}': '{step}' is no item of a list of {len(at)}."
                )
        elif isinstance(at, dict):
            if not last and at.get(step) is None:
                at[step] = {}
        else:
            raise InputError(
                f"override '{override}': nothing can stand below '{steps[position - 1]}'."
            )
        if last:
            at[step] = value
        else:
            at = at[step]
    return tuple(steps)


def _sentence(
    detail: ErrorDetails,
    path: Path,
    root: yaml.Node | None,
    overridden: dict[tuple[str | int, ...], str],
) -> str:
    """One sentence for one of pydantic's complaints."""
    location = tuple(part for part in detail["loc"])
    key = ".".join(str(part) for part in location)
    override = next(
        (
            text
            for steps, text in overridden.items()
            if location and location[: len(steps)] == steps[: len(location)]
        ),
        None,
    )
    if override:
        where = f"override '{override}'"
    elif overridden and not location:  # what does not go together may come from either
        where = f"{path} with {', '.join(repr(text) for text in overridden.values())}"
    else:
        line = line_of(root, location)
        where = f"{path}, line {line}" if line else str(path)
    if detail["type"] == "extra_forbidden":
        siblings = _keys_beside(location)
        close = difflib.get_close_matches(str(location[-1]), siblings, n=1, cutoff=0.5)
        remedy = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(siblings)}."
        return f"{where}: unknown key '{key}'; {remedy}"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if detail["type"] == "missing":
        section = _section_of(location)
        meaning = section.model_fields[str(location[-1])].description
        return f"{where}: '{key}' is missing; add it{f' ({meaning})' if meaning else ''}."
    given = detail["input"]
    shown = "" if isinstance(given, dict | list | BaseModel) else f", not {given!r}"
    subject = f"'{key}': " if key else ""
    return f"{where}: {subject}{message}{shown}."


def _keys_beside(location: tuple[str | int, ...]) -> list[str]:
    return list(_section_of(location).model_fields)


def _section_of(location: tuple[str | int, ...]) -> type[BaseModel]:
    """The section that holds the key at `location`."""
    model: type[BaseModel] = RunConfig
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None:  # a list's number, a mapping's name
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return model
