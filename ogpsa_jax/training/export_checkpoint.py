"""``ogpsa-jax export``: the newest checkpoint of a run as a Hugging Face folder."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.file import located
from ogpsa_jax.config.sections import ExportSection, MeshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import Decoder
from ogpsa_jax.models.folders import check_not_of_a_run
from ogpsa_jax.remote import check_local
from ogpsa_jax.runs import Rounding, RunDir
from ogpsa_jax.training.checkpoints import Checkpoints
from ogpsa_jax.training.evaluator import Evaluation
from ogpsa_jax.training.export import export
from ogpsa_jax.training.inputs import run_date
from ogpsa_jax.training.mesh import make_mesh
from ogpsa_jax.training.metrics import read_metrics
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.prepare import (
    model_config,
    prepare_data,
    prepare_model,
    prepare_reference_log_probs,
    trained_parameters,
)
from ogpsa_jax.training.rounding import measure_rounding, rounding_lines, rounding_warning
from ogpsa_jax.training.step import Network, first_state
from ogpsa_jax.training.summary import measured_before
from ogpsa_jax.training.workload import prepare_workload

logger = logging.getLogger(__name__)


class Exported(NamedTuple):
    """A checkpoint that was written as a folder.

    Attributes:
      step: whose weights they are.
      rounding: what precision cost them; None where it cost nothing.
    """

    step: int
    rounding: Rounding | None


def export_checkpoint(
    run_dir: str | Path, target: str | Path, dtype: str | None = None
) -> Exported:
    """Write the newest checkpoint of a run, finished or not, as a Hugging Face folder.

    What rounding costs is measured and logged.

    Args:
      run_dir: the run directory.
      target: the folder to write; an earlier export there is replaced.
      dtype: of the weights, as in ``export.dtype``; by default what the run's configuration says.

    Returns:
      The step, and what rounding cost.

    Raises:
      InputError: no run there, or one without a checkpoint; or `target` belongs to another run.
    """
    run_dir = Path(run_dir)
    check_local(target, "the folder of the model")
    files = RunDir(run_dir)
    if not files.config_file.exists():
        raise InputError(f"{run_dir}: contains no config.yaml; give a run directory.")
    place = Path(target).resolve()
    if files.checkpoints.resolve() in (place, *place.parents):
        raise InputError(f"{target}: is among the run's checkpoints; choose another place.")
    config = files.config()
    own = place == files.export.resolve()
    if not own:
        check_not_of_a_run(Path(target))
    if dtype is not None and dtype != config.export.dtype:
        if own:
            raise InputError(
                f"{target}: the run's own export has the type of its configuration "
                f"(export.dtype: {config.export.dtype}); choose another place."
            )
        config = config.model_copy(update={"export": ExportSection(dtype=dtype)})
    mesh = make_mesh(MeshSection())  # whatever devices are here: it may have been trained on others
    with located(config):
        network = Network.of(prepare_model(config, mesh), trained_parameters(config))
    optimizer = make_optimizer(config, total_steps=1)
    checkpoints = Checkpoints(files.checkpoints, config.train.keep_checkpoints, write=False)
    like = first_state(network.trained, optimizer, mesh, refreshes=config.refreshes)
    found = checkpoints.restore_newest(like)
    checkpoints.close()
    if found is None:
        raise InputError(f"{run_dir}: contains no readable checkpoint yet.")
    step, state = found
    model = network._replace(trained=state.params).model()
    del state, like
    rounding = None
    if export(config, model, target, keep_unrounded=own):
        rounding = _measure_later(config, mesh, model, run_dir, target)
    return Exported(step, rounding)


def _measure_later(
    config: RunConfig, mesh: Mesh, model: Decoder, run_dir: Path, target: str | Path
) -> Rounding:
    """What rounding costs an export that is made after or during a run, reported at once."""
    evaluations: Mapping[str, Evaluation] = {}
    try:
        data = prepare_data(config, model_config(config), run_date(run_dir))
        data = prepare_reference_log_probs(
            config, data, mesh, functools.partial(prepare_model, config, mesh)
        )
        evaluations = prepare_workload(config, data, mesh).evaluations
    except InputError as error:
        logger.warning("the held-out sets are not measured: %s", error)
    before = measured_before(read_metrics(run_dir))
    rounding = measure_rounding(config, mesh, model, target, evaluations, before)
    for line in rounding_lines(rounding):
        logger.info("%s", line)
    if (warning := rounding_warning(rounding)) is not None:
        logger.warning("%s", warning)
    return rounding
