"""What the core imports: jax and optax, and no room of ours beyond its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import ogpsa_jax

PACKAGE = Path(ogpsa_jax.__file__).parent
# Imports point one way. A room is a package or a module directly below ours; it may import what its
# row names, and itself.
CORE = {"projection"}
PLAIN = {"errors", "files", "remote"}  # what every room but the core may use
ROOMS = {
    "errors": set(),
    "accelerators": set(),
    "remat": set(),
    "remote": {"errors"},
    "files": {"errors", "remote"},
    "validation": set(),
    "manifest": {"files"},
    "progress": set(),
    "projection": set(),
    "__init__": CORE,
    "nnx": CORE,
    "linen": CORE,
    "models": PLAIN | {"manifest", "remat", "__init__"},
    "data": PLAIN | {"progress"},
    "objectives": {"projection", "models", "data"},
    "config": PLAIN | {"objectives", "remat", "validation"},
    "runs": PLAIN | {"config", "models", "validation"},
    "evaluation": PLAIN
    | {"runs", "config", "models", "data", "objectives", "validation", "progress"},
    "reporting": PLAIN | {"runs", "config", "evaluation", "validation"},
    "training": PLAIN
    | {"runs", "config", "projection", "objectives", "models", "data", "manifest", "progress"}
    | {"accelerators"},
}
# Clients of all rooms; none of the others imports them, but for the command line.
CLIENTS = {"planning", "demo", "cli"}
ALL = {*ROOMS, *CLIENTS}


def imported(path):
    """Full names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
    """The first part of a module's path below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_stands_in_a_row():
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} == ALL


def test_rooms_import_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = room_of(path)
        if room in CLIENTS:
            allowed = ALL - CLIENTS | ({"planning", "demo"} if room == "cli" else set())
        else:
            allowed = ROOMS[room]
        for name in imported(path):
            ours, *rooms = name.split(".")
            if ours != "ogpsa_jax" or not rooms:
                continue
            # A name of the core itself, as in `from ogpsa_jax import refresh`.
            other = rooms[0] if rooms[0] in ALL else "__init__"
            core = other == "__init__" and "projection" in allowed
            if other not in {room, *allowed} and not core:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_the_core_needs_jax_and_optax_alone():
    # What is not of jax, of optax or of what these two need may not be imported at all.
    program = """
import sys
import jax, optax, optax.contrib
allowed = {"ogpsa_jax", "jax", "jaxlib", "optax", *sys.stdlib_module_names}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ImportError("the core imports " + name)
sys.meta_path.insert(0, Refuse())
for name in ("flax", "transformers", "datasets", "torch"):
    assert name not in sys.modules, name
import ogpsa_jax
assert ogpsa_jax.ogpsa_project(1).init(jax.numpy.zeros(2)).settings.rank == 1
"""
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
