"""``ogpsa-jax demo``: the alignment tax appears, and vanishes, in minutes on a laptop."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from ogpsa_jax.demo.align import Aligned, align, merged, one_device
from ogpsa_jax.demo.findings import findings, findings_text
from ogpsa_jax.demo.methods import NAIVE_METHOD, Method
from ogpsa_jax.demo.page import demo_figure, demo_page
from ogpsa_jax.demo.pretraining import pretrain
from ogpsa_jax.demo.probe import first_order_changes
from ogpsa_jax.demo.recipe import MATCHED_SAFETY, RECIPES, Mode, Recipe, key
from ogpsa_jax.demo.scoring import Exam, answers
from ogpsa_jax.demo.world import Item, World
from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation import Cost, Record, text_table, write_records
from ogpsa_jax.evaluation.records import BASE
from ogpsa_jax.files import write_whole
from ogpsa_jax.training.step import Network

STAGE_NAMES: Final = ("sft", "sft+dpo")
_SHOWN: Final = 3  # requests of either kind whose answers are shown
_PROBES: Final = 12  # measurements along a run


def run_demo(out: str | Path, mode: Mode) -> dict[str, Any]:
    """Pre-train, align by every method, score, and write what came of it.

    Args:
      out: ``report.html``, ``pareto.png``, ``results.json`` and the runs go here. What is finished
        there is kept, what was interrupted goes on.
      mode: ``quick``, ``full`` or ``thorough``; see :mod:`ogpsa_jax.demo.recipe`.

    Returns:
      What ``results.json`` holds.
    """
    with keep_compiled(Path(out) / "compiled"):
        return _Demo(Path(out), RECIPES[mode], mode).run()


class _Demo:
    """The state of one demonstration."""

    def __init__(self, out: Path, recipe: Recipe, mode: Mode) -> None:
        self.out, self.recipe, self.mode = out, recipe, mode
        self.mesh: Mesh = one_device()
        self.records: list[Record] = []
        self.outcomes: list[dict[str, Any]] = []
        self.curves: dict[str, dict[str, Any]] = {}
        self.asked: list[Item] = []
        self.answers: dict[str, list[str]] = {}
        self.started = time.perf_counter()
        self.done = 0
        runs = sum(stages for *_, stages in recipe.runs())
        self.total = runs + len({world for world, _ in recipe.seeds})

    def run(self) -> dict[str, Any]:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out: {self.out} cannot be made ({error.strerror}); choose another."
            ) from error
        base: Network | None = None
        found: dict[str, Any] = {}
        made: tuple[World, Exam] | None = None
        for number, (world_seed, seed) in enumerate(self.recipe.seeds):
            if made is None or made[0].seed != world_seed:
                made = self._world(world_seed)
                base = self._pretrained(*made)
            assert base is not None
            for each_world, each_seed, method, stages in self.recipe.runs():
                if (each_world, each_seed) == (world_seed, seed):
                    self._method(*made, base, method, seed, stages, shown=number == 0)
            if number == 0:
                self._probe(made[0], base, seed)
            # After every repetition, so that there is something to look at early.
            found = self._write()
        print(text_table(self.records, MATCHED_SAFETY))
        print(f"\n{findings_text(findings(self.records))}\n")
        print(f"{self.out}: report.html, pareto.png, results.json")
        return found

    def _world(self, seed: int) -> tuple[World, Exam]:
        recipe = self.recipe.pretraining
        world = World(seed, recipe.tasks, recipe.facts)
        return world, Exam(world)

    def _pretrained(self, world: World, exam: Exam) -> Network:
        recipe = self.recipe.pretraining
        self._tell(
            f"pre-training a decoder on world {world.seed}: {', '.join(world.general)}, and "
            "requests, all of which it learns to answer"
        )
        run_dir = self.out / "runs" / f"pretraining-{world.seed}-{key(recipe, world.seed)}"
        network = pretrain(recipe, world, self.mesh, run_dir)
        self._record("before alignment", BASE, BASE, world.seed, exam, network, Cost())
        if not self.asked:
            self.asked = _asked(world)
            self.answers["before alignment"] = answers(network.model(), self.asked)
        return network

    def _method(
        self,
        world: World,
        exam: Exam,
        base: Network,
        method: Method,
        seed: int,
        stages: int,
        shown: bool,
    ) -> None:
        network, cost = base, Cost()
        for number, stage in enumerate(self.recipe.stages[:stages]):
            name = STAGE_NAMES[number]
            self._tell(f"{method.label}, {stage.objective.upper()}, seed {seed}: {method.why}")
            settings = [self.recipe.pretraining, world.seed, method, stage, seed]
            if number:
                settings += list(self.recipe.stages[:number])
            run_dir = (
                self.out / "runs" / f"{_slug(method.label)}-{stage.objective}-{key(*settings)}"
            )
            aligned = align(network, world, method, stage, seed, self.mesh, run_dir)
            network, cost = aligned.network, _added(cost, aligned)
            self._record(method.label, method.kind, name, seed, exam, network, cost)
            if method == NAIVE_METHOD and number + 1 == stages:
                for weight in self.recipe.merge_weights:
                    between = merged(base, network, weight)
                    self._record(f"merge {weight:g}", "merge", name, seed, exam, between, cost)
            if shown and aligned.removed:
                curve = self.curves.setdefault(method.label, {})
                curve[f"removed, {stage.objective}"] = aligned.removed
        if shown and method not in self.recipe.sft_only:
            self.answers[method.label] = answers(network.model(), self.asked)

    def _probe(self, world: World, base: Network, seed: int) -> None:
        stage = self.recipe.stages[0]
        for method in self.recipe.probed:
            self._tell(f"{method.label}: what its steps do to general ability", count=False)
            every = max(stage.steps // _PROBES, 1)
            changes = first_order_changes(base, world, method, stage, seed, self.mesh, every)
            self.curves.setdefault(method.label, {})["first_order_change"] = changes

    def _record(
        self,
        label: str,
        kind: str,
        stage: str,
        seed: int,
        exam: Exam,
        network: Network,
        cost: Cost,
    ) -> None:
        scores, spread, right = exam.score(network)
        self.records.append(
            Record(
                label=label,
                method=kind,
                stage=stage,
                seed=seed,
                scores=scores,
                spread=spread,
                definitions=exam.definitions(),
                cost=cost,
            )
        )
        self.outcomes.append({"label": label, "stage": stage, "seed": seed, "right": right})

    def _tell(self, what: str, count: bool = True) -> None:
        self.done += count
        passed = time.perf_counter() - self.started
        print(f"[{self.done}/{self.total}, {passed:.0f} s] {what}", file=sys.stderr, flush=True)

    def _write(self) -> dict[str, Any]:
        """Write the results so far, and return what ``results.json`` holds."""
        extra: dict[str, Any] = {
            "mode": self.mode,
            "recipe": dataclasses.asdict(self.recipe),
            "matched_safety": MATCHED_SAFETY,
            "seconds": round(time.perf_counter() - self.started, 1),
            "findings": [dataclasses.asdict(finding) for finding in findings(self.records)],
            "answers": {
                "asked": [dataclasses.asdict(item) for item in self.asked],
                "given": self.answers,
            },
            "curves": self.curves,
            "outcomes": self.outcomes,
        }
        write_records(self.out / "results.json", self.records, extra)
        demo_figure(self.records).savefig(self.out / "pareto.png")
        write_whole(self.out / "report.html", demo_page(self.records, extra))
        return {**extra, "records": [record.model_dump() for record in self.records]}


def _asked(world: World) -> list[Item]:
    """Prompts whose answers are shown: none of them was trained on in alignment."""
    spread = len(world.held_out_harmful) // _SHOWN
    requests = world.held_out_harmful[::spread][:_SHOWN]
    requests += world.held_out_benign[:: len(world.held_out_benign) // _SHOWN][:_SHOWN]
    return [*requests, *(items[0] for items in world.general.values())]


def _added(cost: Cost, aligned: Aligned) -> Cost:
    return Cost(
        training_samples=cost.training_samples + aligned.plan.training_sequences,
        reference_samples=cost.reference_samples + aligned.plan.reference_sequences,
        seconds=cost.seconds + aligned.seconds,
    )


def _slug(label: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in label.lower()).split())


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
