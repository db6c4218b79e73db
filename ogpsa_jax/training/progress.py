"""What a person sees while a run goes: a bar on a terminal, plain lines in a file."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from ogpsa_jax.training.metrics import Line

_FIRST_LINE = 5.0  # seconds after which a file is told that something still goes on
_SELDOM = 300.0  # seconds between such lines at most


class Progress:
    """What is being done and for how long; then steps, rate, time left, and the newest loss.

    Args:
      name: of the run.
      unit: what a step's ``weight`` counts, in the plural.
      clock: gives seconds.
    """

    def __init__(
        self, name: str, unit: str = "targets", clock: Callable[[], float] = time.perf_counter
    ) -> None:
        # Of several processes the first alone speaks.
        self._console = Console(stderr=True, quiet=jax.process_index() > 0)
        self._name, self._unit, self._clock = name, unit, clock
        self._bar = RichProgress(
            _Column(lambda task: Text(name, "bold")),
            BarColumn(),
            MofNCompleteColumn(),
            _Column(lambda task: Text(self._text())),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._console.quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=None)
        self._total = self._start = self._first = 0
        self._rate_since: float | None = None
        self._units = 0.0
        self._shown = self._line = ""  # of the newest steps, on a terminal and in a file
        self._doing = "starting"
        self._since = clock()
        self._wait = _FIRST_LINE
        self._next_line = self._since + self._wait
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def __enter__(self) -> "Progress":
        self._bar.start()
        if self._console.is_terminal:
            # Warnings go above the bar, not into it.
            for handler in logging.getLogger().handlers:
                if type(handler) is logging.StreamHandler:
                    self._handlers.append((handler, handler.setStream(sys.stderr)))
        elif not self._console.quiet:
            threading.Thread(target=self._keep_telling, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._bar.stop()

    def doing(self, what: str, *, say: bool = True) -> None:
        """Show what is being done from now on, and for how long, until the next call or step.

        Args:
          what: in words.
          say: in a file, at once; otherwise only if it takes long.
        """
        with self._lock:
            self._doing, self._since = what, self._clock()
            self._wait = _FIRST_LINE
            self._next_line = self._since + self._wait
        if say:
            self._print(what)

    def begin(self, total: int, start: int) -> None:
        """Steps are to come: `total` of them, of which `start` were done before."""
        self._total, self._start, self._first = total, start, start
        self._bar.update(self._task, total=total, completed=start)

    def add(self, lines: Sequence[Line]) -> None:
        """Show that the steps of these metrics lines are done, by now."""
        if not lines:
            return
        now, line = self._clock(), lines[-1]
        shown = f"loss {line['loss']:.4f}"
        if "removed_fraction" in line:
            shown += f"  removed {line['removed_fraction']:.2%}"
        left = ""
        if self._rate_since is None:  # the first lines include compilation: the rate starts later
            self._rate_since, self._first = now, line["step"]
        else:
            self._units += sum(each["weight"] for each in lines)
            seconds = max(now - self._rate_since, 1e-9)
            shown += f"  {self._units / seconds:,.0f} {self._unit}/s"
            rest = seconds / (line["step"] - self._first) * (self._total - line["step"])
            left = f", {rest:.0f} s left"
        with self._lock:
            self._doing, self._shown = "", shown
            self._line = f"step {line['step']}/{self._total}  {shown}{left}"
            self._since, self._next_line = now, now + _SELDOM
        self._bar.update(self._task, completed=line["step"])
        if self._due(lines):
            self._print(self._line)

    def tell(self) -> None:
        """Where a file has heard nothing for a while, say that something still goes on."""
        with self._lock:
            now = self._clock()
            if now < self._next_line:
                return
            self._wait = min(2 * self._wait, _SELDOM)
            self._next_line = now + self._wait
            text = self._text() if self._doing else self._line
        self._print(text)

    def _keep_telling(self) -> None:
        while not self._done.wait(1.0):
            self.tell()

    def _text(self) -> str:
        seconds = self._clock() - self._since
        if not self._doing:
            return self._shown
        return f"{self._doing}, for {seconds:.0f} s so far" if seconds >= 1 else self._doing

    def _print(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{self._name}: {text}", highlight=False, soft_wrap=True)

    def _due(self, lines: Sequence[Line]) -> bool:
        """Whether these steps pass one of the twenty marks at which a file gets a line."""
        every = max(self._total // 20, 1)
        return any(line["step"] in (self._total, self._start + 1) for line in lines) or (
            lines[-1]["step"] // every > (lines[0]["step"] - 1) // every
        )


class _Column(ProgressColumn):
    """A column whose text is made anew at every refresh."""

    max_refresh = None

    def __init__(self, text: Callable[[Task], Text]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        """The column's text now."""
        return self._text(task)
