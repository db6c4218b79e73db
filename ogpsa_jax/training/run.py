"""A stage from its configuration to its export, and pipelines of several stages."""

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.file import dump_config, load_config, located
from ogpsa_jax.config.sections import ExportSection, MeshSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.model_card import write_model_card
from ogpsa_jax.files import only_writer, read_json, write_whole
from ogpsa_jax.models import Decoder, save_lora
from ogpsa_jax.models.folders import MODEL_CARD, check_not_of_a_run
from ogpsa_jax.remote import check_local
from ogpsa_jax.training.checkpoints import Checkpoints
from ogpsa_jax.training.evaluator import Evaluation
from ogpsa_jax.training.export import export
from ogpsa_jax.training.hooks import Hooks
from ogpsa_jax.training.inputs import check_same_inputs, run_date
from ogpsa_jax.training.loop import fit
from ogpsa_jax.training.mesh import check_batch, join_processes, make_mesh
from ogpsa_jax.training.metrics import (
    draw_curves,
    read_metrics,
)
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.prepare import (
    model_config,
    prepare_data,
    prepare_model,
    prepare_reference_log_probs,
    trained_parameters,
)
from ogpsa_jax.training.progress import RunProgress, progress_of
from ogpsa_jax.training.references import prepare_references
from ogpsa_jax.training.rounding import (
    loading_warning,
    measure_rounding,
    rounding_lines,
    rounding_warning,
)
from ogpsa_jax.training.step import Network, first_state
from ogpsa_jax.training.summary import (
    judge_curve,
    measured_before,
    reference_samples,
    summarise,
)
from ogpsa_jax.training.workload import prepare_workload

logger = logging.getLogger(__name__)

# Settings that change nothing in the result but float32 round-off: a resumed run may differ here.
_FREE_ON_RESUME: Any = {
    "mesh": ...,
    "output_dir": ...,  # a moved directory is still the same run
    "export": ...,
    "train": {"micro_batch_size", "save_every", "keep_checkpoints", "log_every", "remat"},
}


def train_stages(
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    output_dirs: Sequence[str] | None = None,
    stage_overrides: Sequence[Sequence[str]] | None = None,
    hooks: Callable[[RunConfig], Hooks] | None = None,
) -> list[dict[str, Any]]:
    """Run one stage per configuration, each starting from the export of the one before.

    Args:
      paths: YAML files, in order.
      overrides: ``key.sub=value``, applied to every stage (``model.path`` to the first alone).
      output_dirs: a run directory per stage, instead of the configurations' own.
      stage_overrides: further overrides of each stage alone.
      hooks: makes the hooks of each stage, when it starts, from its configuration.

    Returns:
      The summaries; of several stages, also in ``pipeline.json`` of the last one's directory.

    Raises:
      InputError: bad configuration, data or model of any stage; all configurations and data are
        checked before the first stage starts.
    """
    configs: list[RunConfig] = []
    for number, path in enumerate(paths):
        own = [f"output_dir={output_dirs[number]}"] if output_dirs else []
        own += stage_overrides[number] if stage_overrides else []
        if number:
            overrides = [item for item in overrides if not item.startswith("model.path=")]
            own.append(f"model.path={Path(configs[-1].output_dir) / 'export'}")
            own.append("model.initial_weights=pretrained")
        configs.append(load_config(path, [*overrides, *own]))
    places = [Path(config.output_dir) for config in configs]
    if twice := [place for place in places if places.count(place) > 1]:
        raise InputError(
            f"output_dir: two stages write to the same directory ({twice[0]}); set it in the "
            "configuration files, not for all stages at once."
        )
    for config in configs[1:]:
        # Its own model is not there yet; the first one's has the same tokenizer and architecture.
        model = config.model.model_copy(update={"path": configs[0].model.path})
        with located(configs[0]):
            architecture = model_config(configs[0])
        with located(config):
            prepare_data(config.model_copy(update={"model": model}), architecture)
    summaries = [train(config, hooks(config) if hooks else None) for config in configs]
    if len(summaries) > 1 and jax.process_index() == 0:
        text = json.dumps({"stages": summaries}, indent=1) + "\n"
        write_whole(Path(configs[-1].output_dir) / "pipeline.json", text)
    return summaries


def train(config: RunConfig, hooks: Hooks | None = None) -> dict[str, Any]:
    """Run one stage; resume it if its directory contains checkpoints; return its summary.

    Args:
      config: the resolved configuration.
      hooks: told of each step and evaluation.

    Returns:
      What ``summary.json`` contains: losses before and after, samples and seconds spent, what the
      projection did.

    Raises:
      InputError: before the first step, for bad data, model or settings; names the file and line
        of the configuration that they stand in.
      HookError: a hook failed; the run is saved.
    """
    with located(config):
        return _train(config, hooks)


def _train(config: RunConfig, hooks: Hooks | None) -> dict[str, Any]:
    check_local(config.output_dir, "output_dir")
    run_dir = Path(config.output_dir)
    finished = run_dir / "summary.json"
    _check_same_run(run_dir, config)
    if finished.exists():
        remedy = "delete it, and the same command writes it again from the last checkpoint"
        summary = read_json(finished, remedy) | {"export": str(run_dir / "export")}
        if not (run_dir / "export").is_dir():
            raise InputError(
                f"{run_dir}: this run is finished, but its export is gone; "
                f"`ogpsa-jax export {run_dir} {run_dir / 'export'}` writes it again."
            )
        if load_config(run_dir / "config.yaml").export != config.export:
            raise InputError(
                f"{run_dir}: this run is finished, with another export.dtype; to have its weights "
                f"in this one, `ogpsa-jax export {run_dir} DIR --dtype {config.export.dtype}`."
            )
        if not (run_dir / "export" / MODEL_CARD).exists():  # killed before its last file
            write_model_card(run_dir)
        logger.info("%s is finished and was not changed; delete it to run it again", run_dir)
        return summary
    _check_writable(run_dir)
    join_processes()
    with progress_of(config) as progress:
        return _carry_out(config, run_dir, progress, hooks)


def _carry_out(
    config: RunConfig, run_dir: Path, progress: RunProgress, hooks: Hooks | None
) -> dict[str, Any]:
    """Run a stage that is not finished."""
    finished = run_dir / "summary.json"
    started = time.perf_counter()
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    progress.doing("reading the data")
    data = prepare_data(config, model_config(config), run_date(run_dir))
    if lost_at_start := loading_warning(config):
        logger.warning("%s", lost_at_start)
    policy = functools.cache(functools.partial(prepare_model, config, mesh))
    progress.doing("loading the model")
    data = prepare_references(config, data, mesh, policy)
    data = prepare_reference_log_probs(config, data, mesh, policy)
    workload = prepare_workload(config, data, mesh)
    network = Network.of(policy(), trained_parameters(config))
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            held.enter_context(_started_run_dir(run_dir, config))
        check_same_inputs(run_dir, config, data)
        network, lines = fit(network, workload, config, mesh, run_dir, progress, hooks)
        progress.doing("writing the export")
        model = network.model()
        rounding = None
        if export(config, model, run_dir / "export", keep_unrounded=True):
            rounding = measure_rounding(
                config,
                mesh,
                model,
                run_dir / "export",
                workload.evaluations,
                measured_before(lines),
            )
        if config.model.lora is not None:
            save_lora(model, run_dir / "adapter")
        if jax.process_index() == 0:
            if not any("loss" in line for line in lines):
                raise InputError(
                    f"{run_dir / 'metrics.jsonl'}: no step of this run is left in it, so there is "
                    f"nothing to sum up; the weights are in {run_dir / 'export'}."
                )
            for sentence in judge_curve(config, lines):
                logger.warning("%s", sentence)
            draw_curves(lines, run_dir / "curves.png")
            summary = summarise(config, lines)
            summary["warnings"] = data.warnings + summary["warnings"]
            summary["warnings"] += [lost_at_start] if lost_at_start else []
            if rounding is not None:
                summary["rounding"] = rounding
                if (warning := rounding_warning(rounding)) is not None:
                    logger.warning("%s", warning)
                    summary["warnings"].append(warning)
            summary |= {
                "data": data.report(),
                "reference_samples": reference_samples(workload, config, lines),
                "seconds": round(time.perf_counter() - started, 1),
                "export": str(run_dir / "export"),
                "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            }
            if data.initial:
                summary["references"] = data.initial
            write_whole(finished, json.dumps(summary, indent=1) + "\n")
            write_model_card(run_dir)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{run_dir} is finished")
    return dict(json.loads(finished.read_text()))


def export_checkpoint(run_dir: str | Path, target: str | Path, dtype: str | None = None) -> int:
    """Write the newest checkpoint of a run, finished or not, as a Hugging Face folder.

    Of a finished run, with its model card. What rounding costs is measured and logged.

    Args:
      run_dir: the run directory.
      target: the folder to write; an earlier export there is replaced.
      dtype: of the weights, as in ``export.dtype``; by default what the run's configuration says.

    Returns:
      The step whose weights they are.

    Raises:
      InputError: no run there, or one without a checkpoint; or `target` belongs to another run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").exists():
        raise InputError(f"{run_dir}: contains no config.yaml; give a run directory.")
    place = Path(target).resolve()
    if (run_dir / "checkpoints").resolve() in (place, *place.parents):
        raise InputError(f"{target}: is among the run's checkpoints; choose another place.")
    config = load_config(run_dir / "config.yaml")
    own = place == (run_dir / "export").resolve()
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
    checkpoints = Checkpoints(run_dir / "checkpoints", config.train.keep_checkpoints, write=False)
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
    if (run_dir / "summary.json").exists():
        write_model_card(run_dir, target, rounding)
    return step


def _measure_later(
    config: RunConfig, mesh: Mesh, model: Decoder, run_dir: Path, target: str | Path
) -> dict[str, Any]:
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


def _check_same_run(run_dir: Path, config: RunConfig) -> None:
    """Refuse to continue another run's directory."""
    path = run_dir / "config.yaml"
    if not path.exists():
        return
    before = load_config(path).model_dump(exclude=_FREE_ON_RESUME)
    now = config.model_dump(exclude=_FREE_ON_RESUME)
    for section, value in now.items():
        if value == before[section]:
            continue
        key, old, new = section, before[section], value
        if isinstance(value, dict):
            name = next(name for name in value if value[name] != before[section].get(name))
            key, old, new = f"{section}.{name}", before[section].get(name), value[name]
        raise InputError(
            f"{path}: this directory has a run with {key}: {old!r}, not {new!r}; choose another "
            "output_dir, or delete the directory."
        )


def _check_writable(run_dir: Path) -> None:
    """Refuse, before anything costs time, a directory that cannot be made or written."""
    there = run_dir
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"output_dir: {run_dir} cannot be made, because {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"output_dir: {there} cannot be written to; choose another output_dir.")
    ours = ("checkpoints", "export", "metrics.jsonl", "summary.json")
    if not (run_dir / "config.yaml").exists():
        for name in ours:
            if (run_dir / name).exists():
                raise InputError(
                    f"output_dir: {run_dir} contains {name} but no config.yaml, so its run is "
                    "unknown; choose another output_dir."
                )


@contextlib.contextmanager
def _started_run_dir(run_dir: Path, config: RunConfig) -> Iterator[None]:
    """Make the directory, file the configuration there, and keep it to this process."""
    with contextlib.ExitStack() as held:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(only_writer(run_dir))
            write_whole(run_dir / "config.yaml", dump_config(config))
        except OSError as error:
            raise InputError(
                f"output_dir: {run_dir} cannot be written ({error.strerror}); choose another "
                "output_dir, or fix this."
            ) from error
        yield
