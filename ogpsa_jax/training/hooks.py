"""Functions of the caller that a run calls at each step and evaluation, to log elsewhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from ogpsa_jax.runs import RunDir
from ogpsa_jax.training.processes import everywhere

Hook = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Hooks:
    """What a run calls, in process 0 alone, when the metrics in question are on disk.

    They are called in the order of the steps, and once a step in each session of a run. An
    exception in one ends the run as SIGTERM does: the next step is finished and saved, and
    :class:`HookError` is raised. The same command goes on from there.

    Attributes:
      on_step: ``on_step(step, metrics)`` with 1-based `step` and its line of ``metrics.jsonl``.
      on_evaluation: ``on_evaluation(step, measures)`` after `step` steps, 0: before the first.
      on_finish: ``on_finish(files)`` with the run's files when it is finished, and when it already
        was; ``ogpsa_jax.reporting.write_missing_card`` writes the model card.
    """

    on_step: Hook | None = None
    on_evaluation: Hook | None = None
    on_finish: Callable[[RunDir], object] | None = None


class HookError(RuntimeError):
    """A hook raised an exception; the run is saved."""


class HookCalls:
    """Calls the hooks of a run until one fails.

    Args:
      hooks: of the run.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._failure: tuple[str, Exception] | None = None
        self.failed = False

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Call the hook of that name, if there is one."""
        self._call("on_step", self._hooks.on_step, step, metrics)

    def on_evaluation(self, step: int, measures: Mapping[str, float]) -> None:
        """Call the hook of that name, if there is one."""
        self._call("on_evaluation", self._hooks.on_evaluation, step, measures)

    def _call(self, name: str, hook: Hook | None, step: int, values: Mapping[str, float]) -> None:
        if hook is None or self._failure is not None or jax.process_index() > 0:
            return
        try:
            hook(step, {key: value for key, value in values.items() if key != "step"})
        except Exception as error:
            self._failure = f"{name}, at step {step},", error
            self.failed = jax.process_count() == 1  # several agree first

    def agree(self) -> None:
        """Let every process know, in ``failed``, whether a hook has failed in the first."""
        self.failed = not everywhere(self._failure is None)

    def raise_failure(self, saved: int) -> None:
        """Raise what a hook raised, if one did; all processes come here with the same answer.

        Raises:
          HookError: names the hook and the step that is `saved`.
        """
        self.agree()
        if not self.failed:
            return
        rest = f"step {saved} is saved, and the same call goes on from there"
        if self._failure is None:
            raise HookError(f"a hook failed in process 0; {rest}")
        what, error = self._failure
        raise HookError(f"{what} raised {type(error).__name__}: {error}; {rest}") from error
