"""What is seen of a run while it goes: its metrics on disk, a display, warnings, and hooks."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax

from ogpsa_jax.config import RunConfig
from ogpsa_jax.training.hooks import HookCalls, Hooks
from ogpsa_jax.training.metrics import (
    Line,
    MetricsLog,
    find_capped,
    find_foreign_references,
    find_lost_updates,
    find_noise,
    find_problems,
)
from ogpsa_jax.training.optimizer import learning_rate
from ogpsa_jax.training.progress import RunProgress, progress_of
from ogpsa_jax.training.speed import SpeedMeter
from ogpsa_jax.training.step import Metrics

logger = logging.getLogger(__name__)


class Monitor:
    """Takes the metrics of steps and of evaluations; open within a ``with`` block.

    Metrics of steps stay on the device until :meth:`flush`, so that no step waits for them.

    Args:
      config: of the run.
      run_dir: metrics are written here.
      start: the step that the run resumes from.
      total: optimizer steps of the run.
      progress: the display, if there is one already.
      hooks: called when metrics are on disk.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        start: int,
        total: int,
        progress: RunProgress | None,
        hooks: Hooks,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self._start = start
        self._total = total
        self._progress = progress
        self._rate = jax.jit(learning_rate(config.optimizer, total))
        self._pending: list[tuple[int, Metrics]] = []
        self._warned: set[str] = set()
        self.hooks = HookCalls(hooks)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            self._log = opened.enter_context(
                contextlib.closing(MetricsLog(self._run_dir, self._start))
            )
            self._shown = self._progress or opened.enter_context(progress_of(self._config))
            self._shown.begin(self._total, self._start)
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    @property
    def lines(self) -> list[Line]:
        """All lines of the run's metrics, those of before a resume too."""
        return self._log.lines

    def doing(self, what: str, *, say: bool = True) -> None:
        """Show an activity; see :meth:`ogpsa_jax.progress.Progress.doing`."""
        self._shown.doing(what, say=say)

    def add_step(self, step: int, metrics: Metrics) -> None:
        """Keep the metrics of 1-based `step`, which may not be computed yet."""
        self._pending.append((step, metrics))

    def flush(self, meter: SpeedMeter) -> None:
        """Write the metrics of the steps since the last time, show them, warn, call the hooks."""
        lines = [self._line(step, metrics) for step, metrics in self._pending]
        self._pending.clear()
        speed = meter.measured(lines[-1]["step"]) if lines else {}
        if speed:
            step = lines[-1]["step"]
            self._log.show(step, {f"speed/{name}": value for name, value in speed.items()})
        for line in lines:
            self._log.write(line)
        self._log.flush()
        self._shown.add(lines, speed)
        problems = find_problems(lines) | find_capped(lines, self._config.ogpsa)
        problems |= find_lost_updates(lines, self._config) | find_noise(self.lines, self._config)
        for kind, problem in problems.items():
            if kind not in self._warned:
                logger.warning("%s", problem)
            self._warned.add(kind)
        for line in lines:
            self.hooks.on_step(line["step"], line)
        self.hooks.agree()

    def _line(self, step: int, metrics: Metrics) -> Line:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        line: Line = {"step": step, "learning_rate": float(self._rate(step - 1)), **values}
        if self._config.projects:
            spans_gradients = self._config.ogpsa.subspace == "gradients"
            line["refreshed"] = spans_gradients and "reference/loss" in values
        return line

    def add_evaluation(
        self,
        step: int,
        measures: Mapping[str, float],
        rows: Mapping[str, Any] | None = None,
        references: Mapping[str, float] | None = None,
    ) -> None:
        """Write what was measured after `step` steps; nothing where nothing was measured.

        Args:
          step: 0: before the first step.
          measures: of the held-out sets.
          rows: loss and weight of each of their rows, by set.
          references: measures of the reference sets.
        """
        line = {f"eval/{name}": value for name, value in measures.items()} | dict(references or {})
        if not line:
            return
        self._log.write({"step": step, **line, **({"rows": rows} if rows else {})})
        self._log.flush()
        if references:
            for problem in find_foreign_references(self.lines, self._config):
                logger.warning("%s", problem)
        self.hooks.on_evaluation(step, line)
