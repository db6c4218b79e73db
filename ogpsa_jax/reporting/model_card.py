"""The model card of an export, made from the run's files in the layout of the Hugging Face hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from pydantic import BaseModel, ConfigDict, ValidationError

from ogpsa_jax.config.sections import SourceSection
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json, write_whole
from ogpsa_jax.runs import Rounding, Run, RunDir, find_run, stages
from ogpsa_jax.validation import first_complaint

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_METHODS = {
    "off": "without gradient projection",
    "paper": "with OGPSA as published: every gradient is projected off the reference subspace",
    "recommended": "with OGPSA as this package recommends it",
}
_RULES = {
    "none": "Nothing was projected.",
    "inplane": "Of every safety gradient only what lies in the reference subspace was kept.",
    "conflict": "Of every safety gradient the component in the reference subspace was removed "
    "where it pointed against the references.",
}
_GRADIENTS = (
    "[OGPSA](https://arxiv.org/abs/2602.07892) removes from every safety gradient the component in "
    "the span of a few gradients of general ability, so that safety costs less of it."
)
_INPUTS = (
    "As in [OGPSA](https://arxiv.org/abs/2602.07892), a part of every safety gradient is removed, "
    "so that safety costs less general ability: here what would change the outputs of layers for "
    "the inputs that they have on general examples."
)
# Hyper-parameters worth a line: the settings that decide the weights.
_SHOWN: dict[str, tuple[str, ...] | None] = {
    "optimizer": None,
    "train": ("epochs", "steps", "batch_size"),
    "dpo": None,
    "data": ("template", "max_length", "packing"),
    "model": ("dtype", "param_dtype", "lora"),
    "ogpsa": None,
}


class _Scored(BaseModel):
    """What the card shows of a task."""

    model_config = ConfigDict(extra="ignore")
    kind: str
    value: float
    interval: tuple[float, float] | None
    items: int


class _Results(BaseModel):
    """What the card shows of an evaluation."""

    model_config = ConfigDict(extra="ignore")
    suite: str
    tasks: dict[str, _Scored]


def write_model_card(
    run: str | Path, folder: str | Path | None = None, rounding: Rounding | None = None
) -> Path:
    """Write ``README.md`` beside the weights of an export.

    Args:
      run: a finished run directory.
      folder: the exported model; by default the run's ``export``.
      rounding: what rounding cost that folder; of the run's own, its summary says it.

    Returns:
      The file.

    Raises:
      InputError: the run is not finished, or the folder does not exist.
    """
    found = _finished(run)
    text = _card(found, found.summary.rounding if folder is None else rounding)
    target = found.dir.model_card if folder is None else Path(folder) / found.dir.model_card.name
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder; export the model first.")
    write_whole(target, text)
    return target


def write_missing_card(run: RunDir) -> None:
    """Write the card of a finished run's export where there is none yet."""
    if not run.model_card.exists():
        write_model_card(run.path)


def refresh_card(model: str | Path) -> None:
    """Write the card of the run that a model is the export of, with its newest scores."""
    run = find_run(model)
    if run is not None and run.dir.export.is_dir():
        write_model_card(run.dir.path)


def model_card(run: str | Path) -> str:
    """The card of a run's model: method, data, hyper-parameters, scores, diagnostics.

    Every figure is one of ``summary.json`` or of an evaluation's ``results.json``. Paths of this
    machine do not appear: of a local file, only its name.

    Args:
      run: a finished run directory.

    Raises:
      InputError: the run is not finished, or its files cannot be read.
    """
    found = _finished(run)
    return _card(found, found.summary.rounding)


def _finished(run: str | Path) -> Run:
    found = find_run(run)
    if found is None:
        raise InputError(
            f"{run}: has no config.yaml and summary.json; give the directory of a finished run."
        )
    return found


def _card(run: Run, rounding: Rounding | None) -> str:
    chain = stages(run)
    named = _named(chain)
    path = chain[0].config.model.path
    base = _public_name(path) if path else "a model with random weights"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ogpsa", "safety", "alignment", "jax"],
        base_model=base if _HUB_ID.fullmatch(base) else None,
    )
    held_out, diagnostics = _measures(named)
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=run.summary.name,
        introduction=_introduction(chain, base),
        trained_on_references=_trained_on_references(named),
        data=_table(["stage", "use", "source", "taken"], _data_rows(named)),
        scores=_table(
            ["suite", "task", "kind", "items", "value", "interval"], _score_rows(run.dir)
        ),
        held_out=_table(["stage", "measure", "before", "after"], held_out),
        diagnostics=_table(["stage", "figure", "value"], diagnostics),
        warnings=[(name, text) for name, stage in named for text in stage.summary.warnings],
        rounding=rounding,
        rounded=_rounded(rounding),
        settings=[
            (name, _table(["key", "value"], _hyper_parameters(stage))) for name, stage in named
        ],
    )
    return str(card).rstrip() + "\n"


def _named(chain: Sequence[Run]) -> list[tuple[str, Run]]:
    """The stages by their objectives, numbered where two have the same."""
    names: list[str] = [stage.config.objective for stage in chain]
    if len(set(names)) < len(names):
        names = [f"{i}. {name}" for i, name in enumerate(names, 1)]
    return list(zip(names, chain, strict=True))


def _introduction(chain: Sequence[Run], base: str) -> str:
    steps = " → ".join(stage.config.objective.upper() for stage in chain)
    ogpsa = chain[-1].config.ogpsa
    method = _METHODS.get(ogpsa.preset, f"with the preset {ogpsa.preset}")
    removes = _GRADIENTS
    if ogpsa.preset == "off":
        removes = ""
    elif ogpsa.rule != "orthogonal":
        method, removes = f"with the rule `{ogpsa.rule}` of ogpsa_jax", _RULES[ogpsa.rule]
    elif ogpsa.subspace == "inputs":
        method, removes = "with OGPSA, projected off the inputs of layers", _INPUTS
    told = f"`{base}` after safety fine-tuning ({steps}) {method}."
    return " ".join(part for part in (told, removes, "Made with ogpsa_jax.") if part)


def _trained_on_references(named: Sequence[tuple[str, Run]]) -> list[str]:
    """A sentence for each stage in which reference rows were not only projected against."""
    found = []
    for name, stage in named:
        in_step = stage.config.references.in_step
        if stage.replays and in_step is not None:
            what = (
                "the initial model's predictions of"
                if stage.config.references.target == "initial"
                else "the answers of"
            )
            found.append(
                f"In the stage {name}, the model was also trained on {what} the reference rows: "
                f"{stage.config.reference_rows} of the {stage.config.train.batch_size} rows of "
                f"every step, with weight {in_step.replay_weight:g}."
            )
        if stage.mixes_references:
            found.append(
                f"In the stage {name}, rows of the reference sets were among the training data."
            )
    return found


def _data_rows(named: Sequence[tuple[str, Run]]) -> list[list[str]]:
    rows = []
    for name, stage in named:
        uses: list[tuple[str, Sequence[SourceSection]]] = [("training", stage.config.data.train)]
        if stage.config.projects:  # otherwise named perhaps, but not used
            uses.append(("references", stage.config.references.sets))
        for use, sources in uses:
            for source in sources:
                taken = source.samples or source.split or "all"
                rows.append([name, use, _public_name(source.path), str(taken)])
    return rows


def _measures(named: Sequence[tuple[str, Run]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of held-out measures, and of diagnostics."""
    held_out, diagnostics = [], []
    for name, stage in named:
        before = stage.summary.before
        for measure, value in stage.summary.after.items():
            held_out.append([name, measure, _number(before.get(measure)), _number(value)])
        for figure, value in _diagnostics(stage).items():
            diagnostics.append([name, figure, _number(value)])
    return held_out, diagnostics


def _diagnostics(stage: Run) -> dict[str, Any]:
    summary = stage.summary
    figures: dict[str, Any] = {
        "optimizer steps": summary.steps,
        "training samples": summary.training_samples,
        "reference samples": summary.reference_samples,
        "seconds": summary.seconds,
        "devices": summary.devices,
        "training loss, first step": summary.train_loss.first,
        "training loss, last step": summary.train_loss.last,
    }
    if summary.projection is not None:
        for name, value in summary.projection.model_dump().items():
            figures[f"projection, {name.replace('_', ' ')}"] = value
    return {name: value for name, value in figures.items() if value is not None}


def _rounded(rounding: Rounding | None) -> str:
    if rounding is None:
        return ""
    rows = [
        [name, *map(_number, (rounding.after.get(name), value, rounding.kept.get(name)))]
        for name, value in rounding.rounded.items()
    ]
    return _table(["measure", "as trained", "in this folder", "share of the change left"], rows)


def _score_rows(run: RunDir) -> list[list[str]]:
    rows = []
    for path in run.evaluations():
        remedy = "evaluate the run again"
        try:
            results = _Results.model_validate(read_json(path, remedy))
        except ValidationError as error:
            said = first_complaint(error, _Results)
            raise InputError(f"{path}: {said} To fix it, {remedy}.") from None
        for name, task in results.tasks.items():
            interval = "–" if task.interval is None else " – ".join(map(_number, task.interval))
            perplexity = task.kind == "perplexity"
            kind = "1 / perplexity" if perplexity else task.kind.replace("_", " ")
            rows.append([results.suite, name, kind, str(task.items), _number(task.value), interval])
    return rows


def _hyper_parameters(stage: Run) -> list[list[str]]:
    rows = []
    config = stage.config
    content = config.model_dump(mode="json")
    idle = _idle_settings(stage)
    for section, names in _SHOWN.items():
        if (section == "dpo" and config.objective != "dpo") or (
            section == "ogpsa" and not config.projects
        ):
            continue
        settings = content[section]
        for key in names or settings:
            if settings[key] is not None and f"{section}.{key}" not in idle:
                rows.append([f"{section}.{key}", _setting(settings[key])])
    if config.projects:
        settings = content["references"]
        used = ("loss", "in_step") if config.references.in_step else ("loss", "batch_size")
        rows += [[f"references.{name}", _setting(settings[name])] for name in used]
    rows.append(["seed", str(config.seed)])
    return rows


def _idle_settings(stage: Run) -> set[str]:
    """Settings that had no part in this stage, because another took their place."""
    idle = set()
    if stage.config.train.steps is not None:
        idle.add("train.epochs")
    if stage.config.objective == "dpo":
        idle.add("data.packing")  # pairs are never packed
    return idle


def _public_name(path: str) -> str:
    """A hub id as it is; of a path on a disk its last part alone."""
    if _HUB_ID.fullmatch(path) and not Path(path).exists() and not Path(path).suffix:
        return path
    return Path(path).name


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown; nothing where there is no row."""
    if not rows:
        return ""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *cells]
    )
