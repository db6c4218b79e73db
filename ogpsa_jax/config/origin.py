"""Where a configuration's values were written, so that errors met later still name file and line.

An :class:`InputError` raised while a run is prepared begins with the key that it is about;
:func:`about` puts it there where a room does not know the key. What stands before it, file and line
or the override, is added by :func:`ogpsa_jax.config.file.located`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import line_of
from ogpsa_jax.validation import Location


@dataclass(frozen=True, eq=False)
class Origin:
    """The file, its nodes and the overrides. Configurations that differ here alone are equal.

    Attributes:
      path: the file; None where the configuration was made in Python.
      root: its nodes.
      overrides: the text of each, by the location it sets.
    """

    path: Path | None = None
    root: yaml.Node | None = None
    overrides: Mapping[Location, str] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return True

    def where(self, location: Location) -> str:
        """``override 'a.b=c'``, ``run.yaml, line 4``, ``run.yaml``, or nothing where unknown."""
        for steps, text in self.overrides.items():
            if location and location[: len(steps)] == steps[: len(location)]:
                return f"override '{text}'"
        if self.path is None:
            return ""
        if self.overrides and not location:  # what does not go together may come from either
            return f"{self.path} with {', '.join(repr(text) for text in self.overrides.values())}"
        line = line_of(self.root, location)
        return f"{self.path}, line {line}" if line else str(self.path)


@contextlib.contextmanager
def about(key: str) -> Iterator[None]:
    """Put a key before what a room says of its value."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def location_of(key: str) -> Location:
    """``a.0.b`` as ``("a", 0, "b")``."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))
