"""How scores name the model that they are of: read from the runs that made it."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ogpsa_jax.errors import InputError
from ogpsa_jax.runs.directory import Run, find_run, stages
from ogpsa_jax.runs.scores import BASE, NAIVE, Cost

_RULES = {"conflict": "a-gem", "none": "replay alone", "inplane": "in-span component alone"}
_SEED_SUFFIX = re.compile(r"[-_.]seed[-_.]?\d+$")


@dataclass(frozen=True)
class Provenance:
    """How the report names a model; see :class:`~ogpsa_jax.runs.Record`."""

    label: str
    method: str
    stage: str
    seed: int
    cost: Cost


@dataclass(frozen=True)
class Naming:
    """What a caller calls a model, in place of what its run says; None: as the run says."""

    label: str | None = None
    method: str | None = None
    stage: str | None = None
    seed: int | None = None


def named(model: str | Path, naming: Naming) -> Provenance:
    """As :func:`provenance`, with what the caller names in its place.

    Raises:
      InputError: a name that is not one line of printable text.
    """
    given = {key: value for key, value in asdict(naming).items() if value not in (None, "")}
    found = replace(provenance(model), **given)
    for name in (found.label, found.method, found.stage):
        if not name.strip() or not name.isprintable():
            raise InputError(f"label {name!r}: must be one line of printable text.")
    return found


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
        label=_SEED_SUFFIX.sub("", run.summary.name),
        method=_method(run),
        stage="+".join(part.summary.objective for part in chain),
        seed=run.summary.seed,
        cost=Cost(
            training_samples=sum(part.summary.training_samples for part in chain),
            reference_samples=sum(part.summary.reference_samples for part in chain),
            seconds=sum(part.summary.seconds for part in chain),
        ),
    )


def _method(run: Run) -> str:
    config = run.config
    if config.projects:
        if config.ogpsa.rule in _RULES:
            return _RULES[config.ogpsa.rule]
        if config.ogpsa.placement == "gradient" or config.ogpsa.subspace == "inputs":
            return f"ogpsa-{config.ogpsa.preset}"
        return f"{config.ogpsa.placement} placement"
    if config.model.lora is not None:
        return "lora"
    return "mixing" if run.mixes_references else NAIVE
