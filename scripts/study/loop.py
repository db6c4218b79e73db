"""One trial of the study: the package's core and Optax in a scan, nobody's trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from exam import Exam
from flax import nnx

from ogpsa_jax import ogpsa, refresh, scale_by_column_adam
from ogpsa_jax.data import Example, TrainBatches, fixed_batches
from ogpsa_jax.demo.pretraining import one_device, pretrain
from ogpsa_jax.demo.recipe import RECIPES, key
from ogpsa_jax.demo.world import LONGEST, Exchange, World, examples, refusals
from ogpsa_jax.models import LoraParam, add_lora, merge_lora
from ogpsa_jax.models.decoder import DECODER_KERNELS
from ogpsa_jax.objectives.cross_entropy import shifted_loss_mask
from ogpsa_jax.objectives.sft import sft_loss
from ogpsa_jax.training.optimizer import STACKED_LAYERS
from ogpsa_jax.training.step import Network

PEAK = 4e-4


@dataclass(frozen=True)
class Compute:
    """What a trial may spend.

    Attributes:
      batch: rows a step.
      sequences: rows forward and backward, in all.
      length: tokens a row at most.
    """

    batch: int = 16
    sequences: int = 1760
    length: int = LONGEST


DEMONSTRATION = Compute()


@dataclass(frozen=True)
class Regime:
    """How many general rows there are, and whose words their answers are in."""

    rows: int
    foreign: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.rows} general rows{', their answers in a foreign form' * self.foreign}"


@dataclass(frozen=True)
class Trial:
    """One method with one setting.

    Attributes:
      method: its name in the tables.
      rate: learning rate, relative to the demonstration's.
      share: of general rows in every batch, mixed in or as references.
      weight: of the replayed reference gradient.
      target: what replayed rows teach: their answers, or the initial model's predictions.
      subspace: what is projected: nothing, a span of gradients, or of inputs.
      energy: share of the second moment of the inputs.
      window: reference gradients that a gradient span remembers, of which it keeps four
        directions; 1: the step's own alone.
      every: steps between refreshes, where steps take no reference batch.
      refresh_rows: rows of a refresh, taken in turn.
      momentum: first moments are projected at each refresh.
      column: Adam's second moment is averaged over a kernel's inputs, and the gradient alone is
        projected.
      lora: adapters of rank 8 alone are trained.
      merged: weight of the trained model in a merge with the one before.
    """

    method: str
    rate: float
    share: float = 0.0
    weight: float = 0.0
    target: str = "answers"
    subspace: str = "none"
    energy: float = 0.0
    window: int = 1
    every: int = 0
    refresh_rows: int = 0
    momentum: bool = False
    column: bool = False
    lora: bool = False
    merged: float = 1.0

    @property
    def uses_rows(self) -> bool:
        """Whether general rows matter to it."""
        return bool(self.share or self.every or self.subspace == "inputs")

    def steps(self, rows: int, compute: Compute = DEMONSTRATION) -> int:
        """Steps that the compute pays for."""
        forward = 0.0
        if self.subspace == "inputs":
            forward += rows
        if self.target == "initial":
            forward += rows
        left = compute.sequences - forward / 3
        refreshes = self.refresh_rows / self.every if self.every else 0
        return int(left // (compute.batch + refreshes))


class Setting:
    """A world as one regime sees it."""

    def __init__(self, out: Path, seed: int) -> None:
        recipe = RECIPES["full"].pretraining
        self.seed, self.world = seed, World(seed, recipe.tasks, recipe.facts)
        self.exam = Exam(self.world)
        folder = out / "runs" / f"pretraining-{seed}-{key(recipe, seed)}"
        self.start = pretrain(recipe, self.world, one_device(), folder)
        self.naive: dict[float, Network] = {}

    @lru_cache(maxsize=8)  # noqa: B019 (a handful of worlds)
    def general(self, rows: int, foreign: bool) -> list[Exchange]:
        """The general rows; in a foreign form their answers are right, but not the model's own."""
        items = self.world.draw_general(rows, self.seed)
        return [replace(item, answer=f"so {item.answer}") for item in items] if foreign else items

    def run(self, trial: Trial, regime: Regime) -> dict[str, float]:
        """Train and score."""
        if trial.merged < 1.0:
            done = self._trained(replace(trial, method="naive", merged=1.0), regime)
            return self.exam.score(merge(self.start, done, trial.merged))
        return self.exam.score(self._trained(trial, regime))

    def _trained(self, trial: Trial, regime: Regime) -> Network:
        if trial.method == "naive" and trial.rate in self.naive:
            return self.naive[trial.rate]
        network = learn(
            self.start,
            trial,
            examples(refusals(self.world.harmful)),
            examples(self.general(regime.rows, regime.foreign)),
            peak=PEAK * trial.rate,
            seed=self.seed,
        )
        if trial.method == "naive":
            self.naive[trial.rate] = network
        return network


def merge(start: Network, done: Network, weight: float) -> Network:
    """Weights between two models; `weight` is the second one's."""
    mixed = jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, start.trained, done.trained)
    return done._replace(trained=mixed)


def learn(
    start: Network,
    trial: Trial,
    safe: list[Example],
    general: list[Example],
    *,
    peak: float,
    seed: int,
    compute: Compute = DEMONSTRATION,
) -> Network:
    """Train a model as a trial says.

    Args:
      start: all of its parameters are trained, or those of new adapters, which are then merged.
      trial: the method and its setting.
      safe: rows to learn, none longer than the compute's length.
      general: rows to mix in or to take references from.
      peak: learning rate at the first step; twice that for adapters.
      seed: of the order and of adapters.
      compute: what may be spent.
    """
    network, steps = start, trial.steps(len(general), compute)
    if trial.lora:
        model = network.model()
        add_lora(model, rank=8, alpha=16.0, rngs=nnx.Rngs(seed))
        network = Network.of(model, LoraParam)
    stream = partial(_stream, seed=seed, steps=steps, length=compute.length)
    in_step_rows = round(compute.batch * trial.share) if trial.weight else 0
    if trial.share and not in_step_rows:  # mixed
        weights = [1 - trial.share, trial.share]
        both = safe + [replace(example, source=1) for example in general]
        batches = {"safe": stream(both, compute.batch, weights=weights)}
    else:
        batches = {"safe": stream(safe, compute.batch - in_step_rows)}
    if in_step_rows:
        batches["reference"] = stream(general, in_step_rows)
    refreshes = None
    if trial.every:
        count = -(-steps // trial.every)
        size = trial.refresh_rows // 2
        taken = stream(general, trial.refresh_rows, steps=count)
        refreshes = {
            name: array.reshape(count, 2, size, *array.shape[2:]) for name, array in taken.items()
        }
    whole = fixed_batches(general, batch_size=40, max_length=compute.length)
    trained = _train(
        network.graphdef,
        _Static(**{name: getattr(trial, name) for name in _Static.__dataclass_fields__}),
        (network.trained, network.frozen),
        (start.trained, start.frozen),
        batches,
        refreshes,
        whole,
        jnp.float32(peak * (2.0 if trial.lora else 1.0)),
        jnp.float32(trial.weight),
    )
    network = network._replace(trained=trained)
    if trial.lora:
        merged = Network.of(merge_lora(network.model()))
        network = merged._replace(graphdef=start.graphdef)
    return network


@dataclass(frozen=True)
class _Static:
    """What of a trial decides the program; its rate and weight are numbers in it."""

    subspace: str
    target: str
    energy: float
    window: int
    every: int
    momentum: bool
    column: bool
    lora: bool


def _stream(
    rows: list[Example],
    count: int,
    *,
    seed: int,
    steps: int,
    length: int,
    weights: Sequence[float] = (1.0,),
) -> dict[str, Any]:
    """Arrays ``[steps, rows, T]``, in the trainer's order."""
    batches = TrainBatches(
        rows,
        batch_size=count,
        micro_batch_size=count,
        max_length=length,
        packing=False,
        seed=seed,
        steps=steps,
        weights=weights,
    )
    taken = [batches.batch(step) for step in range(steps)]
    arrays = {name: np.stack([batch[name][0] for batch in taken]) for name in taken[0]}
    width = length - arrays["input_ids"].shape[-1]  # one width for all: one program for all worlds
    return {name: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width)]) for name, a in arrays.items()}


def predictions_kl(model: Any, batch: Any, teacher: jax.Array) -> jax.Array:
    """KL(initial ‖ now) a token in the loss mask, of rows ``[B, T]``; teacher ``[B, T, V]``."""
    logits = model(batch["input_ids"], batch["positions"], batch["segment_ids"])
    mask = shifted_loss_mask(batch)
    each = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), axis=-1)
    return jnp.sum(jnp.where(mask, each, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


@partial(jax.jit, static_argnums=(0, 1))
def _train(
    graphdef: Any,
    trial: _Static,
    network: Any,
    initial: Any,
    batches: Any,
    refreshes: Any,
    whole: Any,
    peak: jax.Array,
    weight: jax.Array,
) -> Any:
    params, frozen = network
    steps = batches["safe"]["input_ids"].shape[0]

    def loss(params: Any, batch: Any) -> jax.Array:
        model, length = nnx.merge(graphdef, params, frozen), batch["input_ids"].shape[-1]
        total, count, _ = sft_loss(model, batch, chunk_size=length)
        return total / jnp.maximum(count, 1.0)

    def reference_loss(params: Any, batch: Any) -> jax.Array:
        if trial.target == "answers":
            return loss(params, batch)
        # The teacher is evaluated here, in place of a cache of it; its cost is in `Trial.steps`.
        model = nnx.merge(graphdef, *initial)
        logits = model(batch["input_ids"], batch["positions"], batch["segment_ids"])
        teacher = jax.lax.stop_gradient(jax.nn.log_softmax(logits))
        return predictions_kl(nnx.merge(graphdef, params, frozen), batch, teacher)

    def rate(step: Any) -> jax.Array:
        return peak * jnp.square(jnp.cos(0.5 * jnp.pi * step / steps))

    adam = optax.scale_by_adam()
    if trial.column:
        adam = scale_by_column_adam(kernels=DECODER_KERNELS)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam)
    inner = optax.chain(clipped, optax.scale_by_learning_rate(rate))
    in_step_rows = "reference" in batches
    settings: dict[str, Any] = {"rank": 1, "stacked": STACKED_LAYERS, "rule": "none"}
    if trial.subspace == "gradients":
        settings |= {"rule": "orthogonal", "rank": 2 if trial.every else min(trial.window, 4)}
        settings |= {"window": trial.window} if in_step_rows else {}
    if trial.subspace == "inputs":
        settings |= {"rank": 10**6, "rule": "orthogonal", "subspace": "inputs"}
        settings |= {"energy": trial.energy, "kernels": DECODER_KERNELS}
        settings |= {"placement": "gradient" if trial.column else "both"}
    # The weight is a traced number here, so the reference comes weighted.
    tx = ogpsa(inner, **settings, replay=1.0 if in_step_rows else None)
    state = tx.init(params)
    if trial.subspace == "inputs":
        model = nnx.merge(graphdef, *initial)
        parts = jax.lax.map(
            lambda b: model.input_moments(b["input_ids"], b["positions"], b["segment_ids"]), whole
        )
        state = refresh(state, moments=jax.tree.map(lambda x: jnp.sum(x, axis=0), parts))

    def step(carry: Any, item: Any) -> tuple[Any, None]:
        params, state = carry
        number, batch = item
        if trial.every:
            sets = jax.tree.map(lambda x: x[number // trial.every], refreshes)
            state = jax.lax.cond(
                number % trial.every == 0,
                lambda state: refresh(
                    state,
                    [jax.grad(loss)(params, jax.tree.map(lambda x: x[i], sets)) for i in (0, 1)],  # noqa: B023
                    project_momentum=trial.momentum,
                ),
                lambda state: state,
                state,
            )
        grads, extra = jax.grad(loss)(params, batch["safe"]), {}
        if in_step_rows:
            reference = jax.grad(reference_loss)(params, batch["reference"])
            extra = {"reference": jax.tree.map(lambda g: weight * g, reference)}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), (jnp.arange(steps), batches))[0][0]
