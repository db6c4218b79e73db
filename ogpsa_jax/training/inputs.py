"""A run resumes only with the data and the model that it began with."""

import datetime
import json
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ogpsa_jax.config import RunConfig
from ogpsa_jax.data import DEFAULT_DATE, digest
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json, write_whole
from ogpsa_jax.runs import RunDir
from ogpsa_jax.training.model_digests import weights_digest
from ogpsa_jax.training.prepare import RunData

_REMEDY = "delete the file to continue with the present data and model"


def run_date(run_dir: Path) -> datetime.date:
    """The day that chat templates print which ask for today's: the one on which the run began.

    Raises:
      InputError: the file that keeps it cannot be read.
    """
    path = RunDir(run_dir).inputs
    if path.exists():
        kept = read_json(path, _REMEDY).get("date", DEFAULT_DATE.isoformat())
        try:
            return datetime.date.fromisoformat(kept)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}: date must be a day such as 2031-12-04, not {kept!r}; {_REMEDY}."
            ) from error
    days = _today().toordinal()
    if jax.process_count() > 1:  # it may be midnight
        days = int(multihost_utils.broadcast_one_to_all(np.int32(days)))
    return datetime.date.fromordinal(days)


def _today() -> datetime.date:
    return datetime.date.today()


def check_same_inputs(run_dir: Path, config: RunConfig, data: RunData) -> None:
    """Compare what the run is given with ``inputs.json``; write that where it is missing.

    The day that its templates print is written with it, see :func:`run_date`.

    Of the data every token counts, and its loss mask, which is all that files, template and
    tokenizer come to. Of a model's weights, samples of every file.

    Args:
      run_dir: the run directory, which exists.
      config: the run's settings.
      data: its examples.

    Raises:
      InputError: something is not what the run began with.
    """
    path = RunDir(run_dir).inputs
    now = {
        "data.train": digest(data.train),
        **{f"references.sets.{i}": digest(rows) for i, rows in enumerate(data.references)},
        **{f"data.eval.{name}": digest(rows) for name, rows in data.evaluations.items()},
        "model.path": weights_digest(str(config.model.path), config.model.initial_weights),
    }
    reference_model = config.dpo.reference_model
    if config.objective == "dpo" and reference_model not in ("initial", "none"):
        now["dpo.reference_model"] = weights_digest(reference_model)
    if data.initial_model is not None and not data.initial_model.own_start:
        section = data.initial_model.section
        now["references.initial_model"] = weights_digest(str(section.path), section.initial_weights)
    if not path.exists():
        if jax.process_index() == 0:
            kept = {**now, "date": data.date.isoformat()}
            write_whole(path, json.dumps(kept, indent=1) + "\n")
        return
    before = read_json(path, _REMEDY)
    for name, value in now.items():
        if before.get(name) != value:
            raise InputError(
                f"{path}: what {name} names has changed since this run began; restore what it "
                "was, or choose another output_dir."
            )
