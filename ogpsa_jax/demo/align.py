"""One run of the demonstration: a task for the trainer, trained by it, scored, kept."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from ogpsa_jax.data import Example, TrainBatches, fixed_batches
from ogpsa_jax.demo.methods import Method, Plan, Stage, plan
from ogpsa_jax.demo.world import LONGEST, Item, World, examples, preferences, refusals
from ogpsa_jax.files import write_whole
from ogpsa_jax.models import LoraParam, add_lora, merge_lora
from ogpsa_jax.objectives.cross_entropy import sequence_log_probs
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.loop import Batches, Task, fit
from ogpsa_jax.training.step import Network, Objective
from ogpsa_jax.training.task import preference_objective


@dataclass(frozen=True)
class Aligned:
    """What a run came to.

    Attributes:
      network: full parameters, adapters merged.
      plan: what was done.
      seconds: it took, in training.
      removed: fraction of the squared gradient (or update) norm that was removed, by step.
    """

    network: Network
    plan: Plan
    seconds: float
    removed: list[float]


def one_device() -> Mesh:
    """The mesh of one device: so small a model gains nothing from more."""
    axes = ("data", "fsdp", "tensor")
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh((1, 1, 1), axes, axis_types=kinds, devices=jax.devices()[:1])


def cross_entropy() -> Objective:
    """The SFT objective with the demonstration's row length."""
    return partial(sft_loss, chunk_size=64)


def align(
    start: Network,
    world: World,
    method: Method,
    stage: Stage,
    seed: int,
    mesh: Mesh,
    run_dir: Path,
) -> Aligned:
    """Train one method in one stage; a finished run is read back, an interrupted one goes on.

    Args:
      start: full parameters; stays as it is.
      world: the data.
      method: what to do.
      stage: where.
      seed: of the general samples and of the order of the data.
      mesh: the devices.
      run_dir: of the run.
    """
    todo = plan(method, stage, seed, str(run_dir))
    task = make_task(start, world, method, stage, todo, mesh)
    run_dir.mkdir(parents=True, exist_ok=True)
    kept = run_dir / "seconds.json"
    started = time.perf_counter()
    network, lines = fit(trainable(start, todo), task, todo.config, mesh, run_dir)
    if not kept.exists():
        write_whole(kept, json.dumps(round(time.perf_counter() - started, 3)) + "\n")
    if todo.config.model.lora is not None:
        network = Network.of(merge_lora(network.model()))
        network = network._replace(graphdef=start.graphdef)
    removed = [line["removed_fraction"] for line in lines if "removed_fraction" in line]
    return Aligned(network, todo, json.loads(kept.read_text()), removed)


def trainable(start: Network, todo: Plan) -> Network:
    """A copy whose trained parameters may be donated, with adapters where the plan has them."""
    copied = start._replace(trained=jax.tree.map(lambda x: x.copy(), start.trained))
    lora = todo.config.model.lora
    if lora is None:
        return copied
    model = copied.model()
    add_lora(
        model,
        rank=lora.rank,
        alpha=lora.alpha,
        targets=lora.targets,
        rngs=nnx.Rngs(todo.config.seed),
    )
    return Network.of(model, LoraParam)


def make_task(
    start: Network, world: World, method: Method, stage: Stage, todo: Plan, mesh: Mesh
) -> Task:
    """Safety rows, general rows or references, as the plan says."""
    config = todo.config
    general = world.draw_general(method.general, config.seed)
    dpo = stage.objective == "dpo"
    objective = preference_objective(config) if dpo else cross_entropy()

    def general_rows(pairs: bool) -> list[Example]:
        # Of general pairs too the refusal is one side, and here it is the worse one.
        if not pairs:
            return examples(general)
        return with_reference_log_probs(start, preferences(general, chosen_refusal=False))

    train = examples(refusals(world.harmful))
    if dpo:
        train = with_reference_log_probs(start, preferences(world.harmful))
    weights = [1.0]
    if method.mixing:
        train += [dataclasses.replace(example, source=1) for example in general_rows(pairs=dpo)]
        weights = [1 - method.mixing, method.mixing]

    def stream(rows: Sequence[Example], count: int, weights: list[float]) -> Batches:
        return TrainBatches(
            rows,
            batch_size=count,
            micro_batch_size=count,
            max_length=LONGEST,
            packing=False,
            seed=config.seed,
            steps=todo.steps,
            weights=weights,
        )

    riding = config.reference_rows
    pairs = config.references.loss == "dpo"
    return Task(
        objective=objective,
        batches=stream(train, stage.batch_size - riding, weights),
        references=_reference_sets(general, todo.reference_sets),
        reference_rows=riding or len(general),
        reference_loss=objective if pairs else cross_entropy(),
        in_step_batches=stream(general_rows(pairs), riding, [1.0]) if riding else None,
    )


def _reference_sets(general: Sequence[Item], count: int) -> list[dict[str, np.ndarray]]:
    """The general samples dealt into `count` sets of equal size, each in batches of about 40."""
    sets = []
    for i in range(count):
        rows = examples(general[i::count])
        batches = -(-len(rows) // 40)
        sets.append(fixed_batches(rows, batch_size=-(-len(rows) // batches), max_length=LONGEST))
    return sets


def with_reference_log_probs(start: Network, pairs: Sequence[Example]) -> list[Example]:
    """Pairs with what the model before the stage says of them."""
    batches = fixed_batches(pairs, batch_size=96, max_length=LONGEST)
    found = [
        np.asarray(
            _log_probs(
                start.graphdef,
                start.trained,
                start.frozen,
                {name: array[i] for name, array in batches.items()},
            )
        )
        for i in range(len(batches["input_ids"]))
    ]
    known = np.concatenate(found)[: len(pairs)]
    return [
        dataclasses.replace(pair, reference_logps=(float(chosen), float(rejected)))
        for pair, (chosen, rejected) in zip(pairs, known, strict=True)
    ]


@partial(jax.jit, static_argnums=0)
def _log_probs(graphdef: Any, trained: Any, frozen: Any, batch: dict[str, jax.Array]) -> jax.Array:
    return sequence_log_probs(nnx.merge(graphdef, trained, frozen), batch, 64)[0]


def merged(before: Network, after: Network, weight: float) -> Network:
    """Weights on the line from one model to another: ``(1 - weight) before + weight after``."""

    def mix(a: jax.Array, b: jax.Array) -> jax.Array:
        return (1 - weight) * a + weight * b

    return before._replace(trained=jax.tree.map(mix, before.trained, after.trained))
