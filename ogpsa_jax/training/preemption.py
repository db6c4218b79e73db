"""SIGTERM ends a run only after the step under way, with everything saved."""

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils


class Terminated(SystemExit):
    """SIGTERM was received and a checkpoint written; exit code 143."""


class SigtermFlag:
    """While active, SIGTERM only sets a flag, so that the step under way is finished and saved.

    With several processes, only some may get the signal, or some may get it earlier. JAX's
    preemption service then handles the signal and makes all processes agree on one step.
    """

    def __enter__(self) -> Callable[[int], bool]:
        self._received = False
        self._before: Any = None
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point
        # In another thread than the main one, whoever runs the main one handles signals.
        with contextlib.suppress(ValueError):
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return lambda step: self._received

    def _receive(self, *_: object) -> None:
        self._received = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
