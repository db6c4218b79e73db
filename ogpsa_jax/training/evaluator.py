"""Held-out sets, measured during training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ogpsa_jax.data.batches import HostBatch
from ogpsa_jax.training.mesh import shard_rows
from ogpsa_jax.training.step import Network, Objective, Params, make_evaluation


@dataclass(frozen=True)
class Evaluation:
    """A held-out set: batches stacked as [batches, rows, ...] and what is measured on them.

    Where the objective gives ``row_loss`` and ``row_weight``, the lines of before and after keep
    them, so that both can be compared row by row.
    """

    batches: HostBatch
    objective: Objective


class Evaluator:
    """Measures the held-out sets.

    Args:
      network: the model; its trained parameters may be others at each measurement.
      sets: the held-out sets by name.
      mesh: the devices.
    """

    def __init__(self, network: Network, sets: Mapping[str, Evaluation], mesh: Mesh) -> None:
        self._frozen = network.frozen
        self._sets = {
            name: (
                shard_rows(item.batches, mesh),
                make_evaluation(network.graphdef, item.objective, mesh),
            )
            for name, item in sets.items()
        }

    def measure(self, params: Params) -> dict[str, float]:
        """``{set}/{measure}`` -> value with these trained parameters."""
        return self.measure_rows(params)[0]

    def measure_rows(self, params: Params) -> tuple[dict[str, float], dict[str, Any]]:
        """The measures, and by set the loss and the weight of each row where they are known."""
        measures: dict[str, float] = {}
        rows: dict[str, Any] = {}
        for name, (batches, measure) in self._sets.items():
            count = len(next(iter(batches.values())))
            parts = [
                measure(params, self._frozen, {key: array[i] for key, array in batches.items()})
                for i in range(count)
            ]
            by_row = [
                [np.asarray(sums.pop(key)) for key in ("row_loss", "row_weight")]
                for _, _, sums in parts
                if "row_loss" in sums
            ]
            loss, weight, sums = jax.tree.map(lambda *xs: sum(float(x) for x in xs), *parts)
            measures[f"{name}/loss"] = loss / weight
            measures |= {f"{name}/{key}": value / weight for key, value in sums.items()}
            if by_row:
                losses, weights = (np.concatenate(arrays) for arrays in zip(*by_row, strict=True))
                full = weights > 0  # the last batch is filled up with empty rows
                rows[name] = {
                    "loss": [float(f"{x:.7g}") for x in losses[full].tolist()],
                    "weight": weights[full].tolist(),
                }
        return measures, rows
