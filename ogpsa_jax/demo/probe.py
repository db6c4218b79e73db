"""What the steps of a method do to general ability, measured along its way.

The run is taken again step by step with the trainer's own compiled steps; at every few of them the
step is compared with the gradient, at the weights before it, of the loss on general samples that no
run has seen: their cosine is the first-order change of general ability.
"""

from functools import partial
from typing import Any, Final

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from ogpsa_jax import first_order_change
from ogpsa_jax.data import fixed_batches
from ogpsa_jax.demo.align import cross_entropy, make_task, trainable
from ogpsa_jax.demo.methods import Method, Stage, plan
from ogpsa_jax.demo.world import LONGEST, World, examples
from ogpsa_jax.training.loop import is_due
from ogpsa_jax.training.mesh import replicate_rest, shard_rows
from ogpsa_jax.training.optimizer import make_optimizer
from ogpsa_jax.training.step import (
    Network,
    TrainState,
    make_loss,
    make_refresh,
    make_train_step,
)

_SAMPLES: Final = 100
_UNUSED_SEED: Final = 999_983  # of a draw that no run makes


def first_order_changes(
    start: Network, world: World, method: Method, stage: Stage, seed: int, mesh: Mesh, every: int
) -> list[tuple[int, float]]:
    """Cosines of a method's steps with fresh general gradients.

    Args:
      start: full parameters.
      world: the data.
      method: full fine-tuning, any projection.
      stage: which one.
      seed: of the run.
      mesh: the devices.
      every: steps between measurements.

    Returns:
      (step, cosine); positive: the step raises the general loss, to first order.
    """
    todo = plan(method, stage, seed, "probe")
    task = make_task(start, world, method, stage, todo, mesh)
    config = todo.config
    optimizer = make_optimizer(config, todo.steps)
    train_step = make_train_step(
        start.graphdef,
        task.objective,
        optimizer,
        reference_loss=None if task.in_step_batches is None else task.reference_loss,
    )
    momentum = config.ogpsa.project_momentum
    refresh = make_refresh(start.graphdef, cross_entropy(), project_momentum=momentum)
    references = tuple(shard_rows(batches, mesh) for batches in task.references)
    rows = examples(world.draw_general(_SAMPLES, _UNUSED_SEED))
    unseen = fixed_batches(rows, batch_size=_SAMPLES, max_length=LONGEST)
    unseen = {name: array[0] for name, array in unseen.items()}
    params = trainable(start, todo).trained
    state = TrainState(params, replicate_rest(optimizer.init(params), mesh))
    found = []
    for step in range(todo.steps):
        if references and config.ogpsa.refresh and is_due(state, step, config.ogpsa.refresh):
            state, _ = refresh(state, start.frozen, references)
        measured = step % every == 0
        before = jax.tree.map(lambda x: x.copy(), state.params) if measured else None
        batches = [task.batches] + ([task.in_step_batches] if task.in_step_batches else [])
        placed = [shard_rows(each.batch(step), mesh) for each in batches]
        state, _ = train_step(state, start.frozen, *placed)
        if measured:
            change = _change(start.graphdef, before, state.params, start.frozen, unseen)
            found.append((step + 1, float(np.asarray(change)[0])))
    return found


@partial(jax.jit, static_argnums=0)
def _change(graphdef: Any, before: Any, after: Any, frozen: Any, batch: Any) -> jax.Array:
    loss = make_loss(graphdef, cross_entropy())
    gradient = jax.grad(lambda params: loss(params, frozen, batch)[0])(before)
    return first_order_change([gradient], optax.tree.sub(after, before))
