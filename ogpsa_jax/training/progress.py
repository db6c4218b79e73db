"""Progress of a run: its steps, their rate, and the newest loss."""

import time
from collections.abc import Callable, Sequence

import jax

from ogpsa_jax.config import RunConfig
from ogpsa_jax.progress import Bar, Progress
from ogpsa_jax.training.metrics import Line

_LONG_WAIT = 0.05  # share of the time, from which on it is shown


class RunProgress(Progress):
    """Activities before and after training, and a bar of optimizer steps in between.

    Of several processes only the first writes.

    Args:
      name: of the run.
      unit: what a step's ``weight`` counts, in the plural.
      clock: gives seconds.
    """

    def __init__(
        self, name: str, unit: str = "targets", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        super().__init__(name, shown=jax.process_index() == 0, clock=clock)
        self._unit = unit
        self._steps: Bar | None = None
        self._rate_since: float | None = None
        self._units = 0.0

    def begin(self, total: int, start: int) -> None:
        """Show that `total` steps are to be taken, of which `start` were taken before."""
        self._steps = self.bar("", total, "steps", start=start)

    def add(self, lines: Sequence[Line], speed: Line | None = None) -> None:
        """Show that the steps of these metrics lines have been taken, and how fast."""
        if not lines or self._steps is None:
            return
        now, line = self.clock(), lines[-1]
        text = f"loss {line['loss']:.4f}"
        if "removed_fraction" in line:
            text += f"  removed {line['removed_fraction']:.2%}"
        if self._rate_since is None:  # the first lines include compilation
            self._rate_since = now
        else:
            self._units += sum(each["weight"] for each in lines)
            rate = self._units / max(now - self._rate_since, 1e-9)
            text += f"  {rate:,.0f} {self._unit}/s"
        if speed and "mfu" in speed:
            text += f"  MFU {speed['mfu']:.0%}"
        if speed and speed["data_wait"] >= _LONG_WAIT:
            text += f"  waits for data {speed['data_wait']:.0%}"
        self._steps.at(line["step"], text)


def progress_of(config: RunConfig) -> RunProgress:
    """What a person sees of a run: a preference loss is counted in pairs."""
    return RunProgress(config.name, "pairs" if config.objective == "dpo" else "targets")
