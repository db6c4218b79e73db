"""When the basis is refreshed, and with which of the reference rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ogpsa_jax.config.sections import RefreshSection
from ogpsa_jax.data.batches import HostBatch
from ogpsa_jax.projection.find import find_states
from ogpsa_jax.training.mesh import shard_rows
from ogpsa_jax.training.step import (
    Metrics,
    Network,
    Objective,
    TrainState,
    distance_moved,
    make_refresh,
)


def refresh_when_due(
    network: Network,
    sets: Sequence[HostBatch],
    loss: Objective,
    section: RefreshSection,
    mesh: Mesh,
    *,
    project_momentum: bool,
    batches_per_refresh: int | None,
) -> Callable[[TrainState, int], tuple[TrainState, Metrics]]:
    """A function that refreshes the basis where that is due.

    Args:
      network: the model.
      sets: the reference sets, each stacked as [batches, rows, ...].
      loss: what is differentiated on them.
      section: when a refresh is due.
      mesh: the devices.
      project_momentum: whether the first moments are projected with the new basis.
      batches_per_refresh: how many batches of each set a refresh takes, in turn; None: all.

    Returns:
      ``refreshed(state, step) -> (state, metrics)`` for before 0-based `step`; no metrics where
      no refresh was due.
    """
    refresh = make_refresh(network.graphdef, loss, project_momentum=project_momentum)
    on_devices = tuple(shard_rows(batches, mesh) for batches in sets)

    def refreshed(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        if not is_due(state, step, section):
            return state, {}
        number = refreshes_so_far(state)
        state, metrics = refresh(
            state, network.frozen, in_turn(on_devices, number, batches_per_refresh)
        )
        if number == 0:  # there was no basis before
            del metrics["reference/captured_fraction"], metrics["distance_moved"]
        return state, metrics

    return refreshed


def is_due(state: TrainState, step: int, section: RefreshSection) -> bool:
    """Whether the basis is to be refreshed before 0-based `step`.

    By the distance, it is decided from the state alone, as a checkpoint has it, so that a resumed
    run decides the same.
    """
    if section.every is not None:
        return step % section.every == 0
    moved = distance_moved(state.params, state.at_refresh)
    return refreshes_so_far(state) == 0 or float(moved) >= (section.distance or 0.0)


def refreshes_so_far(state: TrainState) -> int:
    """How often the basis was refreshed, refusals included, by its own counters."""
    basis = find_states(state.opt_state)[0]
    return int(basis.refreshes) + int(basis.refused_refreshes)


def in_turn(
    sets: Sequence[Mapping[str, Any]], number: int, count: int | None
) -> tuple[dict[str, Any], ...]:
    """The batches that refresh `number`, from 0, takes of each set: the next `count`, or all."""
    if count is None:
        return tuple(dict(batches) for batches in sets)
    taken = []
    for batches in sets:
        there = len(batches["input_ids"])
        chosen = (number * count + np.arange(min(count, there))) % there
        taken.append({name: array[chosen] for name, array in batches.items()})
    return tuple(taken)
