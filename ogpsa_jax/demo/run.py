"""``ogpsa-jax demo``: the alignment tax appears, and is kept small, in minutes on a laptop.

A world is written as files. From there on nothing is done that a user could not do with the same
files: ``train``, ``merge`` and ``evaluate`` are called on them.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import jax
import yaml
from jax.experimental.compilation_cache import compilation_cache

from ogpsa_jax.demo.findings import findings, findings_text
from ogpsa_jax.demo.folder import Folder, read_answers, shown, write_model, write_world
from ogpsa_jax.demo.methods import MERGED, METHODS, configuration
from ogpsa_jax.demo.page import demo_figure, demo_page, named
from ogpsa_jax.demo.pretraining import one_device, pretrain
from ogpsa_jax.demo.recipe import MATCHED_SAFETY, RECIPES, Comparison, Mode, Recipe, key
from ogpsa_jax.demo.scoring import definitions
from ogpsa_jax.demo.world import World
from ogpsa_jax.evaluation import ModelOptions, evaluate
from ogpsa_jax.files import make_folder, write_whole
from ogpsa_jax.models.merge import merge_pretrained
from ogpsa_jax.progress import Progress
from ogpsa_jax.reporting import finding, text_table
from ogpsa_jax.reporting.evidence import METHOD_LINES, measures
from ogpsa_jax.reporting.model_card import refresh_card, write_missing_card
from ogpsa_jax.runs import BASE, ScoreRecord, write_scores
from ogpsa_jax.training import Hooks, train_stages
from ogpsa_jax.training.metrics import read_metrics

BEFORE: Final = "before alignment"
_SCORED_AT_A_TIME: Final = 128  # rows; a task has 192 at most
# So small a model gains nothing from several devices, and is done before a bar is seen.
_SMALL: Final = ModelOptions(mesh=(1, 1, 1))


def run_demo(out: str | Path, mode: Mode, seed: int = 0) -> dict[str, Any]:
    """Pre-train, align by every method, score, and write what came of it.

    Args:
      out: ``report.html``, ``pareto.png``, ``results.json`` and the worlds with their runs go here.
        Finished runs there are kept, interrupted ones resume.
      mode: ``quick``, ``full`` or ``thorough``; see :mod:`ogpsa_jax.demo.recipe`.
      seed: of the first world; further ones have the next numbers.

    Returns:
      What ``results.json`` contains.

    Raises:
      InputError: `out` cannot be made.
    """
    make_folder(Path(out))
    with keep_compiled(Path(out) / "compiled"):
        return _Demo(Path(out), RECIPES[mode], mode, seed).run()


class _Demo:
    """The state of one demonstration."""

    def __init__(self, out: Path, recipe: Recipe, mode: Mode, seed: int) -> None:
        self.out, self.recipe, self.mode = out, recipe, mode
        self.seeds = range(seed, seed + recipe.worlds)
        self.records: list[ScoreRecord] = []
        self.compared: list[list[int]] = [[] for _ in recipe.comparisons]  # numbers of records
        self.scored: dict[Path, ScoreRecord] = {}
        self.curves: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, Any] = {"asked": [], "given": {}}
        self.started = time.perf_counter()
        models = recipe.worlds * (1 + sum(len(each.methods) for each in recipe.comparisons))
        self.progress = Progress("demo")
        self.bar = self.progress.bar("", models, "models")

    def run(self) -> dict[str, Any]:
        with self.progress:
            found = self._run()
        for comparison, records in zip(self.recipe.comparisons, self._tables(), strict=True):
            shown = named(records)
            print(f"{comparison.regime.title}: {finding(shown, MATCHED_SAFETY)}\n")
            print(f"{text_table(shown, MATCHED_SAFETY)}\n")
            print(f"{findings_text(findings(shown))}\n")
        print(f"{self.out}: report.html, pareto.png, results.json")
        return found

    def _run(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for seed in self.seeds:
            world = World(seed, self.recipe.pretraining.tasks, self.recipe.pretraining.facts)
            folder = self._written(world)
            base = self._record(BEFORE, BASE, BASE, seed, folder.model, folder)
            for number, comparison in enumerate(self.recipe.comparisons):
                self.compared[number].append(base)
                first = seed == self.seeds[0] and number == 0
                for method in comparison.methods:
                    self._method(method, number, folder, seed, shown=first)
                # After each, so that there is something to look at early.
                found = self._write()
        return found

    def _written(self, world: World) -> Folder:
        """The files of a world, the model among them."""
        recipe = self.recipe.pretraining
        self.progress.doing(
            f"pre-training a decoder on world {world.seed}: {', '.join(world.general)}, and "
            "requests, all of which it learns to answer"
        )
        folder = Folder(self.out / f"world-{world.seed}-{key(recipe, world.seed)}")
        write_world(world, folder, {each.regime.rows for each in self.recipe.comparisons})
        if not folder.model.exists():
            network = pretrain(recipe, world, one_device(), folder.path / "pretraining")
            write_model(network.model(), folder)
        if not self.answers["asked"]:
            self.answers["asked"] = [dataclasses.asdict(item) for item in shown(world)]
            self._answers(BEFORE, folder.model, folder)
        self.bar.more(1)
        return folder

    def _method(self, name: str, number: int, folder: Folder, seed: int, *, shown: bool) -> None:
        """Train, score and record one method of a comparison."""
        method, comparison = METHODS[name], self.recipe.comparisons[number]
        regime = f", {comparison.regime.name}" if method.uses_rows else ""
        label = method.label + regime
        self.progress.doing(f"{label}, world {seed}: {method.why}")
        runs = train(name, comparison, folder, seed)
        stage = ""
        for stage, run in zip(("sft", "sft+dpo"), runs, strict=False):
            record = self._record(label, method.kind, stage, seed, run, folder)
            self.compared[number].append(record)
        if name == "naive" and number == 0:
            self._merge(runs[-1], folder, stage, seed)
        if shown:
            self._answers(label, runs[-1], folder)
            self.curves[label] = measures(read_metrics(runs[0]))
        self.bar.more(1)

    def _merge(self, naive: Path, folder: Folder, stage: str, seed: int) -> None:
        """Weights between the model before alignment and the naive one: only in the figure."""
        outs = [folder.path / "merges" / naive.name / f"{weight:g}" for weight in MERGED]
        missing = [
            (weight, out) for weight, out in zip(MERGED, outs, strict=True) if not out.exists()
        ]
        if missing:
            merge_pretrained(folder.model, naive, *zip(*missing, strict=True))
        for weight, out in zip(MERGED, outs, strict=True):
            found = self._record(f"merge {weight:g}", "merge", stage, seed, out, folder)
            cost = self.scored[naive].cost
            self.records[found] = self.records[found].model_copy(update={"cost": cost})
            self.compared[0].append(found)

    def _record(
        self, label: str, kind: str, stage: str, seed: int, model: Path, folder: Folder
    ) -> int:
        """The number of the record of a model, which is scored unless it has been."""
        if model not in self.scored:
            results = evaluate(
                model,
                folder.scores,
                None if (model / "config.yaml").exists() else _beside(model, folder.scores),
                options=dataclasses.replace(_SMALL, batch_size=_SCORED_AT_A_TIME),
                progress=False,
            )
            refresh_card(model)
            self.scored[model] = ScoreRecord.model_validate(results["records"][0])
        record = self.scored[model].model_copy(
            update={
                "label": label,
                "method": kind,
                "stage": stage,
                "seed": seed,
                # The items are the world's own; what is asked of them is the same.
                "definitions": definitions(self.recipe.pretraining.tasks),
            }
        )
        known = [
            i
            for i, other in enumerate(self.records)
            if (other.label, other.stage, other.seed) == (label, stage, seed)
        ]
        if known:
            return known[0]
        self.records.append(record)
        return len(self.records) - 1

    def _answers(self, label: str, model: Path, folder: Folder) -> None:
        """What a model says to some prompts."""
        place = _beside(model, folder.answers)
        evaluate(model, folder.answers, place, options=_SMALL, progress=False)
        self.answers["given"][label] = read_answers(place)

    def _tables(self) -> list[list[ScoreRecord]]:
        """The records of each comparison."""
        return [[self.records[i] for i in numbers] for numbers in self.compared]

    def _write(self) -> dict[str, Any]:
        """Write the results so far, and return what ``results.json`` contains."""
        comparisons = [
            {
                "title": comparison.regime.title,
                "records": numbers,
                "findings": [dataclasses.asdict(each) for each in findings(named(records))],
            }
            for comparison, numbers, records in zip(
                self.recipe.comparisons, self.compared, self._tables(), strict=True
            )
        ]
        shown = {record.method for record in self.records}
        lines = METHOD_LINES | {method.kind: method.why for method in METHODS.values()}
        extra: dict[str, Any] = {
            "mode": self.mode,
            "worlds": list(self.seeds),
            "recipe": dataclasses.asdict(self.recipe),
            "matched_safety": MATCHED_SAFETY,
            "seconds": round(time.perf_counter() - self.started, 1),
            "comparisons": comparisons,
            "methods": {kind: line for kind, line in lines.items() if kind in shown},
            "answers": self.answers,
            "curves": self.curves,
        }
        write_scores(self.out / "results.json", self.records, extra)
        demo_figure(self._tables()[0]).savefig(self.out / "pareto.png")
        write_whole(self.out / "report.html", demo_page(self.records, extra))
        return {**extra, "records": [record.model_dump() for record in self.records]}


def train(name: str, comparison: Comparison, folder: Folder, seed: int) -> list[Path]:
    """Run the stages of a method; finished ones are kept.

    The configurations are written to ``configs`` in the world's folder, for ``ogpsa-jax train``.

    Args:
      name: of the method.
      comparison: where it stands.
      folder: the world's files.
      seed: of the data's order.

    Returns:
      The run directories: of SFT, and of DPO where there is one.
    """
    paths: list[Path] = []
    places: list[Path] = []
    before: list[dict[str, Any]] = []
    make_folder(folder.path / "configs")
    for objective in ("sft", "dpo")[: 1 + comparison.dpo]:
        config = configuration(name, comparison.regime, folder, seed, objective)
        before.append(config)
        place = folder.path / "runs" / f"{name}-{objective}-{key(*before)}"
        path = folder.path / "configs" / f"{place.name}.yaml"
        write_whole(path, yaml.safe_dump(config | {"output_dir": str(place)}, sort_keys=False))
        paths.append(path)
        places.append(place)
    train_stages(paths, hooks=lambda _: Hooks(on_finish=write_missing_card))
    return places


def _beside(model: Path, suite: Path) -> Path:
    """Where an evaluation of a model goes that does not belong to its run."""
    world = suite.parent
    return world / "evaluations" / suite.stem / "-".join(model.relative_to(world).parts)


@contextmanager
def keep_compiled(folder: Path) -> Iterator[None]:
    """Keep compiled programs: runs that differ in their data alone then compile once."""
    settings = {
        "jax_compilation_cache_dir": str(folder.absolute()),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
    compilation_cache.reset_cache()  # which otherwise stays with the first folder it was given
