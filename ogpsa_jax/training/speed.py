"""How fast a run is: ``speed.jsonl``, TensorBoard and the progress bar.

These figures depend on the machine and not on the run, so they have a file of their own:
``metrics.jsonl`` is the same to the bit, wherever and however often a run was interrupted.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ogpsa_jax.accelerators import accelerator
from ogpsa_jax.config.sections import ProfileSection
from ogpsa_jax.models import DecoderConfig
from ogpsa_jax.training.array_cache import cache_folder
from ogpsa_jax.training.metrics import Line


def model_flops(config: DecoderConfig, tokens: float, attended: float, *, frozen: bool) -> float:
    """Operations that training a model needs, whatever a program computes again.

    Two for every entry of a matrix that a token meets, and four for every entry of queries and
    values where a token attends, forward; twice that backward (PaLM, arXiv 2204.02311, appendix B;
    here a token attends to its own document, up to itself). Half of the backward pass is left out
    where the matrices are frozen, as with adapters.

    Args:
      config: the model.
      tokens: how many, padding left out.
      attended: tokens that they attend to, in all.
      frozen: whether the model's own matrices are not trained.
    """
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = 2 * config.hidden_size * (width + kv_width)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    matrices = config.num_layers * layer + config.hidden_size * config.vocab_size
    scores = 4 * config.num_layers * width * attended
    return (4 if frozen else 6) * matrices * tokens + 3 * scores


class SpeedMeter:
    """Measures between flushes of the metrics, so that no step waits for a clock.

    What is no step (compilation, refreshes, evaluations, checkpoints) does not count.

    Args:
      path: the file; of several processes the first alone writes it.
      config: of the model.
      half: whether it computes in half precision, to which published peaks refer.
      frozen: see :func:`model_flops`.
      clock: gives seconds.
    """

    def __init__(
        self,
        path: Path,
        config: DecoderConfig,
        *,
        half: bool,
        frozen: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._path, self._config, self._frozen, self._clock = path, config, frozen, clock
        device = accelerator(jax.devices()[0].device_kind)
        self._peak = device.flops if device is not None and half else None
        self._since: float | None = None  # nothing is measured before the first step is compiled
        self._forget()

    def _forget(self) -> None:
        self._excluded = self._waited = self._tokens = self._attended = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what makes the next batch."""
        began = self._clock()
        yield
        self._waited += self._clock() - began

    @contextlib.contextmanager
    def excluded(self, state: Any) -> Iterator[None]:
        """Around what is no step; waits for `state`, which the steps before it compute."""
        jax.block_until_ready(state)  # type: ignore[no-untyped-call]
        began = self._clock()
        yield
        self._excluded += self._clock() - began

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Count a step, and the tokens of its batch; host arrays ``[..., T]``."""
        self._steps += 1
        self.add_tokens(batch)

    def add_tokens(self, batch: Mapping[str, np.ndarray]) -> None:
        """Count the tokens of one more batch of a step."""
        real = batch["segment_ids"] > 0
        self._tokens += float(np.sum(real))
        self._attended += float(np.sum(np.where(real, batch["positions"] + 1.0, 0.0)))

    def restart(self) -> None:
        """Measure from now on, when everything before is computed."""
        self._forget()
        self._since = self._clock()

    def measured(self, step: int) -> Line:
        """The figures of the steps since :meth:`restart`, all of them computed; then it restarts.

        Returns:
          ``step_seconds``; ``tokens_per_second``, of padding-free tokens, reference rows included,
          and the same ``_per_device``; ``data_wait``, the share of the time in which the next batch
          was made; and ``mfu``, model FLOPs utilization, where the device's peak is known. Empty
          where nothing was measured.
        """
        if self._since is None or not self._steps:
            self.restart()
            return {}
        seconds = max(self._clock() - self._since - self._excluded, 1e-9)
        rate = self._tokens / seconds
        found: Line = {
            "step_seconds": seconds / self._steps,
            "tokens_per_second": rate,
            "tokens_per_second_per_device": rate / jax.device_count(),
            "data_wait": min(self._waited / seconds, 1.0),
        }
        if self._peak is not None:
            flops = model_flops(self._config, self._tokens, self._attended, frozen=self._frozen)
            found["mfu"] = flops / seconds / (self._peak * jax.device_count())
        if jax.process_index() == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **found}) + "\n")
        self.restart()
        return found


class Profiler:
    """Writes a trace of some steps, which TensorBoard and Perfetto open.

    Args:
      folder: where to.
      section: which; None: no trace.
    """

    def __init__(self, folder: Path, section: ProfileSection | None) -> None:
        self._folder, self._section = folder, section
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Called before 1-based `step` with what the steps before compute."""
        if self._section is not None and step == self._section.start:
            jax.block_until_ready(state)  # type: ignore[no-untyped-call]
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True

    def after(self, step: int, state: Any) -> None:
        """Called after 1-based `step` with what it computes."""
        section = self._section
        if self._running and section is not None and step >= section.start + section.steps - 1:
            jax.block_until_ready(state)  # type: ignore[no-untyped-call]
            self.close()

    def close(self) -> None:
        """End a trace that is being written."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()  # type: ignore[no-untyped-call]


def keep_compilations(folder: str | None) -> None:
    """Let JAX keep compiled programs for the next run, unless its own settings say where.

    Args:
      folder: ``train.compilation_cache``.
    """
    if folder is None or jax.config.jax_compilation_cache_dir:
        return
    if folder == "auto":
        if jax.default_backend() == "cpu":
            return
        folder = str(cache_folder("compilations"))
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))  # type: ignore[no-untyped-call]
