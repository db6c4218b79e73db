"""States of ours in ``flax.serialization`` (``to_bytes``, ``to_state_dict``), without flax.

Flax serialises what is in its registry, and takes anything else for one value. The core does not
import flax; whoever does finds our states there, whichever of the two was imported first.
"""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

FLAX = "flax.serialization"
_STATES: list[type] = []


def serialisable(state: type) -> type:
    """Class decorator: a dataclass whose dynamic fields flax saves and restores.

    Its static fields are those of the target that is restored into.
    """
    _STATES.append(state)
    if FLAX in sys.modules:
        _register(sys.modules[FLAX], state)
    return state


def _register(flax: ModuleType, state: type) -> None:
    names = [f.name for f in dataclasses.fields(state) if not f.metadata.get("static")]

    def to_dict(value: Any) -> dict[str, Any]:
        return {name: flax.to_state_dict(getattr(value, name)) for name in names}

    def from_dict(target: Any, found: dict[str, Any]) -> Any:
        if found.keys() != set(names):
            raise ValueError(
                f"{state.__name__}: expected the fields {', '.join(names)}, got "
                f"{', '.join(map(str, found))}"
            )
        new = {
            name: flax.from_state_dict(getattr(target, name), found[name], name=name)
            for name in names
        }
        return dataclasses.replace(target, **new)

    flax.register_serialization_state(state, to_dict, from_dict, override=True)


class _WhenImported(MetaPathFinder):
    """Lets flax be found and loaded as ever, and then registers our states."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != FLAX:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # whatever else the module's own loader can do
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for state in _STATES:
            _register(module, state)


if FLAX not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
