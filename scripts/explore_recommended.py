"""What `preset: recommended` should be: one setting varied at a time, in the demonstration's world.

python scripts/explore_recommended.py --out runs/demo --worlds 0 [--axis momentum replay ...]

Pre-trained weights are shared with `ogpsa-jax demo` where `--out` is the same; finished runs are
kept. Prints a Markdown table and which claims hold; `--write FILE` puts the table between the
markers of `--section`.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ogpsa_jax.demo.align import align, one_device
from ogpsa_jax.demo.findings import findings, findings_text
from ogpsa_jax.demo.methods import (
    MIXING_METHOD,
    MORE_MIXING_METHOD,
    NAIVE_METHOD,
    PLENTY,
    RECOMMENDED_METHOD,
    REPLAY_METHOD,
    SCARCE,
    SCARCE_REPLAY_WEIGHT,
    Method,
    scarce,
)
from ogpsa_jax.demo.pretraining import pretrain
from ogpsa_jax.demo.recipe import MATCHED_SAFETY, RECIPES, key
from ogpsa_jax.demo.run import keep_compiled
from ogpsa_jax.demo.scoring import Exam
from ogpsa_jax.demo.world import World
from ogpsa_jax.evaluation import Cost, Record, markdown_table, write_records
from ogpsa_jax.evaluation.records import BASE
from ogpsa_jax.training.presets import PRESETS

_OGPSA = {"preset": "recommended-gradients"}
_IN_STEP = PRESETS["recommended-gradients"]["references"]["in_step"]


def varied(label: str, *, in_step: bool = True, general: int = PLENTY, **changes: object) -> Method:
    """The recommended setting with some keys of `ogpsa` or `references.in_step` changed."""
    riding = {name: changes.pop(name) for name in list(changes) if name in _IN_STEP}
    rate = changes.pop("learning_rate", 1.0)
    return dataclasses.replace(
        RECOMMENDED_METHOD,
        label=label,
        kind=label,
        general=general,
        learning_rate=float(str(rate)),
        ogpsa={**_OGPSA, **changes},
        in_step={**_IN_STEP, **riding} if in_step else None,
    )


def _scarce(label: str, **changes: object) -> Method:
    """What is recommended with few general samples, with some keys changed."""
    changes = {"replay_weight": SCARCE_REPLAY_WEIGHT, **changes}
    return varied(f"{label}, {SCARCE} samples", general=SCARCE, **changes)


AXES: dict[str, list[Method]] = {
    "comparison": [NAIVE_METHOD, MIXING_METHOD, RECOMMENDED_METHOD, REPLAY_METHOD],
    "mixing": [MORE_MIXING_METHOD, scarce(MORE_MIXING_METHOD)],
    "momentum": [varied("momentum projected", project_momentum=True)],
    "replay": [
        varied("replay 0", replay_weight=0.0),
        varied("replay 0, momentum projected", replay_weight=0.0, project_momentum=True),
        *(varied(f"replay {weight:g}", replay_weight=weight) for weight in (0.5, 2.0, 4.0)),
    ],
    "rank": [
        varied("rank 1, window 1", rank=1, window=1),
        varied("rank 2, window 64", rank=2),
        varied("rank 10, window 64", rank=10),
    ],
    "share": [varied("share 0.25", share=0.25)],
    "refresh": [
        varied(
            "refresh every 10", in_step=False, rank=2, refresh={"every": 10}, project_momentum=True
        ),
        varied(
            "refresh every 30", in_step=False, rank=2, refresh={"every": 30}, project_momentum=True
        ),
    ],
    "placement": [
        varied("update, replay 0", placement="update", replay_weight=0.0),
    ],
    "rate": [
        varied("half the learning rate", learning_rate=0.5),
        varied("twice the learning rate", learning_rate=2.0),
    ],
    "scarce": [
        scarce(MIXING_METHOD),
        scarce(RECOMMENDED_METHOD),
        scarce(REPLAY_METHOD),
        *(_scarce(f"replay {weight:g}", replay_weight=weight) for weight in (1.0, 2.0, 4.0, 16.0)),
        _scarce("rank 1, window 1", rank=1, window=1),
        _scarce("rank 10, window 64", rank=10),
    ],
}


def explored(out: Path, worlds: list[int], axes: list[str]) -> Iterator[Record]:
    """One record per setting and world, SFT alone, as the thorough demonstration does it."""
    recipe = RECIPES["thorough"]
    stage, mesh = recipe.stages[0], one_device()
    for seed in worlds:
        world = World(seed, recipe.pretraining.tasks, recipe.pretraining.facts)
        exam = Exam(world)
        name = f"pretraining-{seed}-{key(recipe.pretraining, seed)}"
        base = pretrain(recipe.pretraining, world, mesh, out / "runs" / name)
        scores, spread, _ = exam.score(base)
        yield Record(
            label="before",
            method=BASE,
            stage=BASE,
            seed=seed,
            scores=scores,
            spread=spread,
            definitions=exam.definitions(),
        )
        for method in (method for axis in axes for method in AXES[axis]):
            run_dir = out / "explored" / key(recipe.pretraining, seed, method, stage, seed)
            done = align(base, world, method, stage, seed, mesh, run_dir)
            scores, spread, _ = exam.score(done.network)
            cost = Cost(
                training_samples=done.plan.training_sequences,
                reference_samples=done.plan.reference_sequences,
                seconds=done.seconds,
            )
            yield Record(
                label=method.label,
                method=method.kind,
                stage="sft",
                seed=seed,
                scores=scores,
                spread=spread,
                definitions=exam.definitions(),
                cost=cost,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2], help="their seeds")
    parser.add_argument("--axis", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--write", type=Path, help="Markdown file with the markers")
    parser.add_argument("--section", default="explored", help="the name in the markers")
    arguments = parser.parse_args()
    records = []
    with keep_compiled(arguments.out / "compiled"):
        for record in explored(arguments.out, arguments.worlds, arguments.axis):
            print(record.seed, record.label, record.scores, file=sys.stderr, flush=True)
            records.append(record)
    write_records(arguments.out / "explored" / f"{arguments.section}.json", records)
    table = markdown_table(records, MATCHED_SAFETY)
    print(f"{table}\n\n{findings_text(findings(records))}")
    if arguments.write:
        begin, end = (f"<!-- {which} {arguments.section} -->" for which in ("BEGIN", "END"))
        pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
        text = arguments.write.read_text(encoding="utf-8")
        text = pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)
        arguments.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
