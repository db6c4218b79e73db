"""When the basis is refreshed, and with which of the reference rows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ogpsa_jax.config.sections import RefreshSection
from ogpsa_jax.data.batches import HostBatch
from ogpsa_jax.objectives.cross_entropy import shifted_loss_mask
from ogpsa_jax.projection.find import find_states
from ogpsa_jax.training.mesh import row_shards, shard_rows
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
    micro_batch_size: int,
    aside: Callable[[TrainState], AbstractContextManager[None]],
) -> Callable[[TrainState, int], tuple[TrainState, Metrics]]:
    """A function that refreshes the basis where that is due.

    Args:
      network: the model.
      sets: the reference sets, each stacked as [batches, rows, ...], with ``row_share``.
      loss: what is differentiated on them.
      section: when a refresh is due.
      mesh: the devices.
      project_momentum: whether the first moments are projected with the new basis.
      batches_per_refresh: how many batches of each set a refresh takes, in turn; None: all.
      micro_batch_size: rows of a device at a time, at most.
      aside: around a refresh, for what measures steps.

    Returns:
      ``refreshed(state, step) -> (state, metrics)`` for before 0-based `step`; no metrics where
      no refresh was due.
    """
    refresh = make_refresh(network.graphdef, loss, project_momentum=project_momentum)

    def on_devices(number: int) -> tuple[dict[str, jax.Array], ...]:
        taken = in_turn(sets, number, batches_per_refresh)
        shards = row_shards(mesh)
        return tuple(shard_rows(spread_rows(s, shards, micro_batch_size), mesh) for s in taken)

    always = on_devices(0) if batches_per_refresh is None else None

    def refreshed(state: TrainState, step: int) -> tuple[TrainState, Metrics]:
        if not is_due(state, step, section):
            return state, {}
        number = refreshes_so_far(state)
        with aside(state):
            state, metrics = refresh(state, network.frozen, always or on_devices(number))
            jax.block_until_ready(metrics)  # type: ignore[no-untyped-call]
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


def row_shares(batches: HostBatch, *, pairs: bool) -> np.ndarray:
    """What each row counts in the mean loss of its batch: 1 over the batch's weight.

    Args:
      batches: stacked as [batches, rows, ...].
      pairs: whether the weight is the number of pairs, and not that of target tokens.

    Returns:
      float32 [batches, rows].
    """
    masks = {name: jnp.asarray(batches[name]) for name in ("loss_mask", "segment_ids")}
    tokens = np.asarray(shifted_loss_mask(masks)).sum(axis=-1, dtype=np.float32)
    by_row = tokens.reshape(*tokens.shape[:2], -1)
    weights = (by_row > 0).all(axis=-1) if pairs else by_row.sum(axis=-1)
    total = np.maximum(weights.sum(axis=-1, keepdims=True), 1)
    return np.broadcast_to((1 / total).astype(np.float32), weights.shape)


def spread_rows(batches: HostBatch, shards: int, micro_batch_size: int) -> HostBatch:
    """The rows of all batches over all row shards, so that none computes on what fills up.

    Batches of four rows, one after the other, would leave all but four shards without work.

    Args:
      batches: stacked as [batches, rows, ...], with ``row_share``.
      shards: row shards of the mesh.
      micro_batch_size: rows of a device at a time, at most.

    Returns:
      The same rows as [micro-batches, rows, ...], then empty rows without a share. The mean over
      micro-batches of the sum of ``row_share`` times loss is the mean of the batches' mean losses.
    """
    count, size = batches["row_share"].shape
    micro_batches, rows = spread_shape(count * size, shards, micro_batch_size)

    def spread(array: np.ndarray) -> np.ndarray:
        flat = array.reshape(-1, *array.shape[2:])
        missing = [(0, micro_batches * rows - len(flat))] + [(0, 0)] * (flat.ndim - 1)
        return np.pad(flat, missing).reshape(micro_batches, rows, *flat.shape[1:])

    found = {name: spread(array) for name, array in batches.items()}
    found["row_share"] = found["row_share"] * np.float32(micro_batches / count)
    return found


def spread_shape(rows: int, shards: int, micro_batch_size: int) -> tuple[int, int]:
    """How many micro-batches of how many rows, over all shards, waste the least on so many rows."""
    share = -(-rows // shards)
    micro_batches = -(-share // micro_batch_size)
    return micro_batches, shards * -(-share // micro_batches)
