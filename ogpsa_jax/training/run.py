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
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import only_writer, write_whole
from ogpsa_jax.models import Decoder, save_lora
from ogpsa_jax.remote import check_local
from ogpsa_jax.runs import InitialModelUse, Rounding, RowCounts, RunDir, Summary
from ogpsa_jax.training.evaluator import Evaluation
from ogpsa_jax.training.export import export
from ogpsa_jax.training.hooks import HookError, Hooks
from ogpsa_jax.training.inputs import check_same_inputs, run_date
from ogpsa_jax.training.loop import fit
from ogpsa_jax.training.mesh import check_batch, make_mesh
from ogpsa_jax.training.metrics import Line, draw_curves
from ogpsa_jax.training.prepare import (
    model_config,
    prepare_data,
    prepare_model,
    prepare_reference_log_probs,
    trained_parameters,
)
from ogpsa_jax.training.processes import ending_together, join_processes
from ogpsa_jax.training.progress import RunProgress, progress_of
from ogpsa_jax.training.references import prepare_references
from ogpsa_jax.training.rounding import (
    loading_warning,
    measure_rounding,
    rounding_warning,
)
from ogpsa_jax.training.speed import keep_compilations
from ogpsa_jax.training.step import Network
from ogpsa_jax.training.summary import (
    curve_warnings,
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
    "ogpsa": {"offload"},
    "train": {
        *("micro_batch_size", "loss_chunk", "remat"),
        *("save_every", "keep_checkpoints", "log_every", "profile", "compilation_cache"),
    },
}


def train_stages(
    paths: Sequence[str | Path],
    overrides: Sequence[str] = (),
    output_dirs: Sequence[str] | None = None,
    stage_overrides: Sequence[Sequence[str]] | None = None,
    hooks: Callable[[RunConfig], Hooks] | None = None,
) -> list[Summary]:
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
        text = json.dumps({"stages": [summary.content() for summary in summaries]}, indent=1) + "\n"
        write_whole(Path(configs[-1].output_dir) / "pipeline.json", text)
    return summaries


def train(config: RunConfig, hooks: Hooks | None = None) -> Summary:
    """Run one stage; resume it if its directory contains checkpoints; return its summary.

    Args:
      config: the resolved configuration.
      hooks: told of each step and evaluation, and when the run is finished.

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


def _train(config: RunConfig, hooks: Hooks | None) -> Summary:
    check_local(config.output_dir, "output_dir")
    run_dir = Path(config.output_dir)
    files = RunDir(run_dir)
    _check_same_run(run_dir, config)
    if files.summary_file.exists():
        # The directory may have been moved since.
        summary = files.summary().model_copy(update={"export": str(files.export)})
        if not files.export.is_dir():
            raise InputError(
                f"{run_dir}: this run is finished, but its export is gone; "
                f"`ogpsa-jax export {run_dir} {run_dir / 'export'}` writes it again."
            )
        if files.config().export != config.export:
            raise InputError(
                f"{run_dir}: this run is finished, with another export.dtype; to have its weights "
                f"in this one, `ogpsa-jax export {run_dir} DIR --dtype {config.export.dtype}`."
            )
        logger.info("%s is finished and was not changed; delete it to run it again", run_dir)
        _call_on_finish(hooks, files)
        return summary
    _check_writable(run_dir)
    join_processes()
    keep_compilations(config.train.compilation_cache)
    with ending_together(), progress_of(config) as progress:
        summary = _carry_out(config, run_dir, progress, hooks)
    _call_on_finish(hooks, files)
    return summary


def _call_on_finish(hooks: Hooks | None, files: RunDir) -> None:
    if hooks is None or hooks.on_finish is None or jax.process_index() > 0:
        return
    try:
        hooks.on_finish(files)
    except InputError:
        raise
    except Exception as error:
        raise HookError(
            f"on_finish raised {type(error).__name__}: {error}; the run is finished, and the same "
            "call calls it again"
        ) from error


def _carry_out(
    config: RunConfig, run_dir: Path, progress: RunProgress, hooks: Hooks | None
) -> Summary:
    """Run a stage that is not finished."""
    files = RunDir(run_dir)
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
        rounding = _write_model(config, mesh, network.model(), files, workload.evaluations, lines)
        if jax.process_index() == 0:
            _check_steps(files, lines)
            for sentence in judge_curve(config, lines):
                logger.warning("%s", sentence)
            draw_curves(lines, files.curves)
            warnings = [lost_at_start] if lost_at_start else []
            if rounding is not None and (warning := rounding_warning(rounding)) is not None:
                logger.warning("%s", warning)
                warnings.append(warning)
            Summary(
                **summarise(config, lines),
                warnings=[*data.warnings, *curve_warnings(config, lines), *warnings],
                data={name: RowCounts(**counts) for name, counts in data.report().items()},
                reference_samples=reference_samples(workload, config, lines),
                seconds=round(time.perf_counter() - started, 1),
                export=str(files.export),
                devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                references=InitialModelUse(**data.initial) if data.initial else None,
                rounding=rounding,
            ).write(files.summary_file)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{run_dir} is finished")
    return files.summary()


def _write_model(
    config: RunConfig,
    mesh: Mesh,
    model: Decoder,
    files: RunDir,
    evaluations: Mapping[str, Evaluation],
    lines: Sequence[Line],
) -> Rounding | None:
    """Write the export, and the adapter if there is one; what the export rounds away."""
    rounding = None
    if export(config, model, files.export, keep_unrounded=True):
        before = measured_before(lines)
        rounding = measure_rounding(config, mesh, model, files.export, evaluations, before)
    if config.model.lora is not None:
        save_lora(model, files.adapter)
    return rounding


def _check_steps(files: RunDir, lines: Sequence[Line]) -> None:
    if not any("loss" in line for line in lines):
        raise InputError(
            f"{files.metrics}: no step of this run is left in it, so there is nothing to sum up; "
            f"the weights are in {files.export}."
        )


def _check_same_run(run_dir: Path, config: RunConfig) -> None:
    """Refuse to continue another run's directory."""
    path = RunDir(run_dir).config_file
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
    if not RunDir(run_dir).config_file.exists():
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
            write_whole(RunDir(run_dir).config_file, dump_config(config))
        except OSError as error:
            raise InputError(
                f"output_dir: {run_dir} cannot be written ({error.strerror}); choose another "
                "output_dir, or fix this."
            ) from error
        yield
