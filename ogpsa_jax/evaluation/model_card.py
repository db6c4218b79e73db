"""The model card of an export, made from the run's files in the layout of the Hugging Face hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.provenance import Run, find_run, stages
from ogpsa_jax.files import write_whole

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
# Hyper-parameters worth a line: the settings that decide the weights.
_SHOWN = {
    "optimizer": None,
    "train": ("epochs", "steps", "batch_size"),
    "dpo": None,
    "data": ("template", "max_length", "packing"),
    "model": ("dtype", "param_dtype", "lora"),
    "ogpsa": None,
}


def write_model_card(
    run: str | Path,
    folder: str | Path | None = None,
    rounding: dict[str, Any] | None = None,
) -> Path:
    """Write ``README.md`` beside the weights of an export.

    Args:
      run: a finished run directory.
      folder: the exported model; by default the run's ``export``.
      rounding: what rounding cost that folder; by default what the run's summary says of its own.

    Returns:
      The file.

    Raises:
      InputError: the run is not finished, or the folder does not exist.
    """
    text = model_card(run, None if folder is None else rounding or {})
    target = Path(run) / "export" if folder is None else Path(folder)
    if not target.is_dir():
        raise InputError(f"{target}: no such folder; export the model first.")
    write_whole(target / "README.md", text)
    return target / "README.md"


def model_card(run: str | Path, rounding: dict[str, Any] | None = None) -> str:
    """The card of a run's model: method, data, hyper-parameters, scores, diagnostics.

    Every figure is one of ``summary.json`` or of an evaluation's ``results.json``. Paths of this
    machine do not appear: of a local file, only its name.

    Args:
      run: a finished run directory.
      rounding: what rounding cost the export, where it is not the run's own; ``{}``: nothing.

    Raises:
      InputError: the run has no ``config.yaml`` or ``summary.json``.
    """
    found = find_run(run)
    if found is None:
        raise InputError(
            f"{run}: has no config.yaml and summary.json; give the directory of a finished run."
        )
    chain = stages(found)
    base = _base_model(chain[0])
    parts = [
        _front_matter(base),
        f"# {found.summary.get('name', found.folder.name)}",
        _introduction(chain, base),
        "## Training data",
        _table(["stage", "use", "source", "taken"], _data_rows(chain)),
        *_measured(found, chain),
        *_rounding(_part(found.summary, "rounding") if rounding is None else rounding),
        "## Hyper-parameters",
        *(part for name, stage in _named(chain) for part in _hyper_parameters(name, stage)),
        "## Use",
        "The folder is a Hugging Face checkpoint: transformers and vLLM load it, and so does "
        "`ogpsa_jax.models.load_pretrained`.",
        "## Limits",
        "Scores apply to the data named beside them. How a model refuses a fixed list of requests "
        "says nothing about requests that were made to get around it. Check the model on your own "
        "use before you rely on it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(base: str) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ogpsa", "safety", "alignment", "jax"],
    }
    if _HUB_ID.fullmatch(base):
        fields["base_model"] = base
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _named(chain: Sequence[Run]) -> list[tuple[str, Run]]:
    """The stages by their objectives, numbered where two have the same."""
    names = [str(stage.summary.get("objective", "?")) for stage in chain]
    if len(set(names)) < len(names):
        names = [f"{i}. {name}" for i, name in enumerate(names, 1)]
    return list(zip(names, chain, strict=True))


def _introduction(chain: Sequence[Run], base: str) -> str:
    steps = " → ".join(str(stage.summary.get("objective", "?")).upper() for stage in chain)
    preset = str(chain[-1].summary.get("preset", "off"))
    method = _METHODS.get(preset, f"with the preset {preset}")
    removes = (
        "[OGPSA](https://arxiv.org/abs/2602.07892) removes from every safety gradient the "
        "component in the span of a few gradients of general ability, so that safety costs less "
        "of it."
    )
    ogpsa = _part(chain[-1].config, "ogpsa")
    if preset != "off" and (rule := ogpsa.get("rule", "orthogonal")) != "orthogonal":
        method = f"with the rule `{rule}` of ogpsa_jax"
        removes = _RULES.get(str(rule), "")
    elif preset != "off" and ogpsa.get("subspace") == "inputs":
        method = "with OGPSA, projected off the inputs of layers"
        removes = (
            "As in [OGPSA](https://arxiv.org/abs/2602.07892), a part of every safety gradient is "
            "removed, so that safety costs less general ability: here what would change the "
            "outputs of layers for the inputs that they have on general examples."
        )
    elif preset == "off":
        removes = ""
    told = f"`{base}` after safety fine-tuning ({steps}) {method}."
    return " ".join(part for part in (told, removes, "Made with ogpsa_jax.") if part)


def _data_rows(chain: Sequence[Run]) -> list[list[str]]:
    rows = []
    for objective, stage in _named(chain):
        sections = {
            "training": _part(stage.config, "data").get("train") or [],
            "references": _part(stage.config, "references").get("sets") or [],
        }
        if stage.summary.get("preset", "off") == "off":
            del sections["references"]  # named perhaps, but not used
        for use, sources in sections.items():
            for source in sources:
                count = source.get("samples") or source.get("split") or "all"
                rows.append([objective, use, _public_name(str(source.get("path"))), str(count)])
    return rows


def _measured(run: Run, chain: Sequence[Run]) -> list[str]:
    """Scores, held-out measures and diagnostics: those parts that there are."""
    parts: list[str] = []
    scores = _score_rows(run)
    if scores:
        parts += [
            "## Scores",
            "Value and 95 % confidence interval over the items.",
            _table(["suite", "task", "kind", "items", "value", "interval"], scores),
        ]
    held_out, diagnostics = [], []
    for objective, stage in _named(chain):
        before, after = _part(stage.summary, "before"), _part(stage.summary, "after")
        for name, value in after.items():
            held_out.append([objective, name, _number(before.get(name)), _number(value)])
        for name, value in _diagnostics(stage).items():
            diagnostics.append([objective, name, _number(value)])
    if held_out:
        parts += [
            "## Measures of the run",
            "On the sets under `data.eval`, before the first step and after the last.",
            _table(["stage", "measure", "before", "after"], held_out),
        ]
    parts += ["## Diagnostics", _table(["stage", "figure", "value"], diagnostics)]
    warnings = [
        f"- Warning ({objective}): {warning}"
        for objective, stage in _named(chain)
        for warning in stage.summary.get("warnings") or []
    ]
    parts += ["\n".join(warnings)]
    return parts


def _rounding(found: dict[str, Any]) -> list[str]:
    """What is left of the last stage in the weights of this folder; nothing where all is."""
    if not found:
        return []
    after, kept = _part(found, "after"), _part(found, "kept")
    rows = [
        [name, _number(after.get(name)), _number(value), _number(kept.get(name))]
        for name, value in _part(found, "rounded").items()
    ]
    sentence = (
        f"The weights were trained in a finer type than that of this folder ({found['dtype']}). "
        f"Rounding leaves {found['update_kept']:.1%} of the last stage's update."
    )
    table = _table(["measure", "as trained", "in this folder", "share of the change left"], rows)
    return ["## Rounding", sentence, *([table] if rows else [])]


def _diagnostics(stage: Run) -> dict[str, Any]:
    summary = stage.summary
    figures: dict[str, Any] = {
        "optimizer steps": summary.get("steps"),
        "training samples": summary.get("training_samples"),
        "reference samples": summary.get("reference_samples"),
        "seconds": summary.get("seconds"),
        "devices": summary.get("devices"),
        "training loss, first step": _part(summary, "train_loss").get("first"),
        "training loss, last step": _part(summary, "train_loss").get("last"),
    }
    for name, value in _part(summary, "projection").items():
        figures[f"projection, {name.replace('_', ' ')}"] = value
    return {name: value for name, value in figures.items() if value is not None}


def _score_rows(run: Run) -> list[list[str]]:
    rows = []
    for path in sorted(run.folder.glob("evaluation/*/results.json")):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            for name, task in results["tasks"].items():
                interval = "–"
                if task["interval"] is not None:
                    interval = " – ".join(_number(end) for end in task["interval"])
                kind, value = task["kind"].replace("_", " "), _number(task["value"])
                if task["kind"] == "perplexity":
                    kind = "1 / perplexity"
                rows.append([results["suite"], name, kind, str(task["items"]), value, interval])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: not the results of an evaluation; evaluate the run again."
            ) from error
    return rows


def _hyper_parameters(name: str, stage: Run) -> list[str]:
    rows = []
    projects = stage.summary.get("preset", "off") != "off"
    idle = _idle_settings(stage)
    for section, names in _SHOWN.items():
        if section == "dpo" and stage.summary.get("objective") != "dpo":
            continue
        if section == "ogpsa" and not projects:
            continue
        settings = _part(stage.config, section)
        for key in names or settings:
            if settings.get(key) is not None and f"{section}.{key}" not in idle:
                rows.append([f"{section}.{key}", _setting(settings[key])])
    if projects:
        settings = _part(stage.config, "references")
        used = ("loss", "in_step") if settings.get("in_step") else ("loss", "batch_size")
        rows += [[f"references.{n}", _setting(settings[n])] for n in used if settings.get(n)]
    rows.append(["seed", str(stage.summary.get("seed", stage.config.get("seed")))])
    return [f"### {name}", _table(["key", "value"], rows)]


def _idle_settings(stage: Run) -> set[str]:
    """Settings that had no part in this stage, because another took their place."""
    idle = set()
    if _part(stage.config, "train").get("steps") is not None:
        idle.add("train.epochs")
    if stage.summary.get("objective") == "dpo":
        idle.add("data.packing")  # pairs are never packed
    return idle


def _base_model(first: Run) -> str:
    path = _part(first.config, "model").get("path")
    return _public_name(str(path)) if path else "a model with random weights"


def _public_name(path: str) -> str:
    """A hub id as it is; of a path on a disk its last part alone."""
    if _HUB_ID.fullmatch(path) and not Path(path).exists() and not Path(path).suffix:
        return path
    return Path(path).name


def _part(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    value = mapping.get(name)
    return value if isinstance(value, dict) else {}


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    return json.dumps(value) if isinstance(value, dict | list | bool) else str(value)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *cells]
    )
