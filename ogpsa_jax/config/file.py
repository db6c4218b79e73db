"""Reading a configuration: YAML, overrides from the command line, and errors that name the line."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ogpsa_jax.config.origin import Location, Origin, location_of
from ogpsa_jax.config.schema import RunConfig
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import Yaml12Loader, expand_environment, read_yaml
from ogpsa_jax.validation import first_complaint, first_detail

_RENAMED = {"ogpsa.refresh_every": "ogpsa.refresh: {every: N}"}
_KEY = re.compile(r"[a-z_]+(\.\w+)*")


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
    origin = Origin(path, root, overridden)
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        location = first_detail(error)["loc"]
        said = first_complaint(error, RunConfig, _RENAMED)
        where = origin.where(location or (() if origin.overrides else key_of(said)))
        raise InputError(f"{where}: {said}") from error
    config._origin = origin
    return config


@contextlib.contextmanager
def located(config: RunConfig) -> Iterator[None]:
    """Put file and line, or the override, before errors that begin with a key of `config`."""
    try:
        yield
    except InputError as error:
        location = key_of(str(error))
        where = config._origin.where(location) if location else ""
        if not where:
            raise
        raise InputError(f"{where}: {error}") from error


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
            ("of the preset" if prefix.startswith("ogpsa.") else "required")
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


def _apply_override(raw: dict[str, Any], override: str) -> Location:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"override '{override}': expected key.sub=value.")
    try:
        value = yaml.load(text, Loader=Yaml12Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(
            f"override '{override}': the value is not valid YAML; put text in quotes."
        ) from error
    steps = location_of(key)
    at: Any = raw
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(at, list):
            if not isinstance(step, int) or step >= len(at):
                raise InputError(
                    f"override '{override}': '{step}' is not an item of a list of {len(at)}."
                )
        elif isinstance(at, dict):
            if not last and at.get(step) is None:
                at[step] = {}
        else:
            raise InputError(
                f"override '{override}': '{steps[position - 1]}' has no keys below it."
            )
        if last:
            at[step] = value
        else:
            at = at[step]
    return steps


def key_of(sentence: str) -> Location:
    """The location of the key with which a sentence begins; empty where it begins with none."""
    match = _KEY.match(sentence)
    location = location_of(match[0]) if match else ()
    kind: Any = RunConfig
    for part in location:
        if get_origin(kind) in (tuple, dict):  # a list's number, a mapping's name
            kind = get_args(kind)[0 if isinstance(part, int) else -1]
            continue
        kinds = [k for k in (kind, *get_args(kind)) if isinstance(k, type)]
        section = next((k for k in kinds if issubclass(k, BaseModel)), None)
        field = section.model_fields.get(str(part)) if section else None
        if field is None:
            return ()
        kind = field.annotation
    return location
