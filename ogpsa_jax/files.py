"""Reading files that users write, and writing files completely or not at all."""

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ogpsa_jax.errors import InputError
from ogpsa_jax.remote import check_local

logger = logging.getLogger(__name__)
LOCK = ".lock"  # the file in a folder that its only writer has locked
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Yaml12Loader(yaml.SafeLoader):
    """YAML safe-load as version 1.2 reads it: 1e-6 is a number, off and no are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as in the class it replaces
        first: [item for item in resolvers if item[0] != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As in the class above, but a key that stands twice is an error, not the last one."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' appears a second time", key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF")
)
Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path, what: str) -> tuple[Any, yaml.Node | None]:
    """The values of a YAML file, and its nodes for :func:`line_of`.

    Args:
      path: the file.
      what: what it is, for the message.

    Raises:
      InputError: it cannot be read, or is not YAML; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        return yaml.load(text, Loader=Yaml12Loader), yaml.compose(text, Loader=Yaml12Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"{path}: cannot read the {what}: {reason}.") from error
    except (ValueError, RecursionError) as error:  # a date that no calendar has, [[[[...
        raise InputError(f"{path}: not valid YAML ({error}); fix the file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(f"{path}{line}: {problem}; fix the YAML there.") from error


def line_of(node: yaml.Node | None, location: Sequence[str | int]) -> int | None:
    """The line of the innermost part of `location` that the file contains."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif (
            isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value)
        ):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def expand_environment(value: Any, path: Path) -> Any:
    """`value` with ``${NAME}`` and ``${NAME:-default}`` in its texts replaced.

    Raises:
      InputError: a variable without a default is not set.
    """
    if isinstance(value, dict):
        return {key: expand_environment(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [expand_environment(item, path) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            raise InputError(
                f"{path}: environment variable {name} is not set; set it, or write "
                f"${{{name}:-default}}."
            )
        if name not in os.environ:
            _tell_default(name, found, path)
        return found

    return _VARIABLE.sub(replace, value)


@functools.cache
def _tell_default(name: str, default: str, path: Path) -> None:
    """Once, because a file may name a variable many times."""
    logger.info("%s: %s is not set, so its default %s is used", path, name, default or "nothing")


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
      InputError: it cannot be made, or is an address.
    """
    check_local(path, "the folder for results")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: this folder cannot be created ({error.strerror}); choose another."
        ) from error


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder until this one ends, even by a kill.

    A file system without locks keeps no process out.

    Raises:
      InputError: another process is at work there.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"{folder}: another process is writing there; wait for it, or choose another folder."
        ) from error
    except (NotImplementedError, OSError) as error:
        logger.warning(
            "%s: cannot be locked (%s), so nothing keeps another process from writing there as "
            "well; start one at a time",
            folder,
            error,
        )
    try:
        yield
    finally:
        lock.release()


def read_json(path: Path, remedy: str = "fix the file") -> dict[str, Any]:
    """An object from a JSON file.

    Args:
      path: the file.
      remedy: what to do where it is not as it must be, for the message.

    Raises:
      InputError: the file is missing, is not JSON, or contains no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing; {remedy}.") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        raise InputError(f"{path}: cannot be read as JSON ({error}); {remedy}.") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}; {remedy}.")
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that even after a crash the old or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
