"""Where a checkpoint comes from: what its run directory, and the runs before it, say."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.records import BASE, NAIVE, Cost

_ENDLESS = 1e18
_RULES = {"conflict": "a-gem", "none": "replay alone", "inplane": "in-span component alone"}
_SEED_SUFFIX = re.compile(r"[-_.]seed[-_.]?\d+$")


@dataclass(frozen=True)
class Run:
    """A finished training run.

    Attributes:
      folder: its directory.
      config: ``config.yaml``.
      summary: ``summary.json``.
    """

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Provenance:
    """How the report names a model; see :class:`~ogpsa_jax.evaluation.records.Record`."""

    label: str
    method: str
    stage: str
    seed: int
    cost: Cost


def find_run(model: str | Path) -> Run | None:
    """The finished run that a model is the export of, or ``None``.

    Args:
      model: a run directory, its ``export``, or anything else.

    Raises:
      InputError: the run's files cannot be read.
    """
    path = Path(model)
    for folder in (path, path.parent) if path.name == "export" else (path,):
        config, summary = folder / "config.yaml", folder / "summary.json"
        if config.is_file() and summary.is_file():
            return Run(folder, _mapping(config), _mapping(summary))
    return None


def stages(run: Run) -> list[Run]:
    """The runs that led to a run, the first of them first: each started from the one before."""
    return list(reversed(list(_backwards(run))))


def provenance(model: str | Path) -> Provenance:
    """Label, method, stage, seed and cost of a model, read from the runs that made it.

    The label is the run's name without ``-seed3`` at its end, so that seeds of one setting are one
    row of the table. A model without a run is taken for one before alignment. A run without
    projection is naive, unless it trained adapters (``lora``) or on its reference sets
    (``mixing``); one with it is called by its preset, rule or placement.
    """
    run = find_run(model)
    if run is None:
        return Provenance(Path(model).name or str(model), BASE, BASE, 0, Cost())
    chain = stages(run)
    return Provenance(
        label=_SEED_SUFFIX.sub("", str(run.summary.get("name", run.folder.name))),
        method=_method(run),
        stage="+".join(str(part.summary.get("objective", "?")) for part in chain),
        seed=int(_count(run, "seed")),
        cost=Cost(
            training_samples=int(sum(_count(part, "training_samples") for part in chain)),
            reference_samples=int(sum(_count(part, "reference_samples") for part in chain)),
            seconds=sum(_count(part, "seconds") for part in chain),
        ),
    )


def _count(run: Run, name: str) -> float:
    """A number of the summary; 0 where it has none of that name."""
    value = run.summary.get(name, 0)
    if not isinstance(value, int | float) or not 0 <= value < _ENDLESS:
        raise InputError(
            f"{run.folder / 'summary.json'}: {name} must be a number of 0 or more, not {value!r}; "
            "fix the file."
        )
    return value


def _method(run: Run) -> str:
    preset = str(run.summary.get("preset", "off"))
    model, ogpsa, data, references = (
        section if isinstance(section := run.config.get(name), dict) else {}
        for name in ("model", "ogpsa", "data", "references")
    )
    if preset != "off":
        rule = ogpsa.get("rule", "orthogonal")
        if rule in _RULES:
            return _RULES[rule]
        placement = ogpsa.get("placement", "gradient")
        if placement == "gradient" or ogpsa.get("subspace") == "inputs":
            return f"ogpsa-{preset}"
        return f"{placement} placement"
    if model.get("lora"):
        return "lora"
    general = {source.get("path") for source in references.get("sets") or []}
    mixed = any(source.get("path") in general for source in data.get("train") or [])
    return "mixing" if mixed else NAIVE


def _backwards(run: Run) -> Iterator[Run]:
    seen: set[Path] = set()
    at: Run | None = run
    while at is not None and at.folder.resolve() not in seen:
        seen.add(at.folder.resolve())
        yield at
        model = at.config.get("model")
        path = model.get("path") if isinstance(model, dict) else None
        at = find_run(path) if isinstance(path, str) else None


def _mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys and values.")
    return content
