"""What the core imports: jax and optax, and no room of ours beyond its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import ogpsa_jax

PACKAGE = Path(ogpsa_jax.__file__).parent
# Imports point one way; a room may import those named here, and itself.
ROOMS = {
    "projection": set(),
    "models": set(),
    "data": set(),
    "evaluation": {"objectives", "models", "data"},
    "reporting": {"evaluation"},
    "objectives": {"projection", "models", "data"},
    "config": {"objectives"},
    "training": {"config", "projection", "objectives", "models", "data", "evaluation"},
}


def imported(path):
    """Full names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_rooms_import_one_way():
    wrong = []
    for room, allowed in ROOMS.items():
        for path in sorted((PACKAGE / room).rglob("*.py")):
            for name in imported(path):
                ours, *rooms = name.split(".")
                other = rooms[0] if ours == "ogpsa_jax" and rooms else room
                if other in {*ROOMS, "demo", "cli"} - {room, *allowed}:
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
