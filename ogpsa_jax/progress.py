"""Progress of long work on stderr: bars on a terminal, lines at growing intervals in a file."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from rich import progress as rich_progress
from rich.console import Console
from rich.text import Text

_FIRST_WAIT = 5.0  # seconds until a file gets a further line; each wait is twice the one before
_LONGEST_WAIT = 300.0
_open: list["Progress"] = []  # those whose blocks run now, the innermost last


class Progress:
    """Shows what is being done and for how long, and bars, while its ``with`` block runs.

    The bars of a block inside another one are drawn below those of the outer block.

    Args:
      name: the first word of every line.
      shown: False: nothing is written.
      clock: gives seconds.
    """

    def __init__(
        self,
        name: str = "",
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._name = name
        self._console = Console(stderr=True, quiet=not shown)
        self._inside = shown and bool(_open)
        self._bars: rich_progress.Progress = _open[-1]._bars if self._inside else self._new_bars()
        self._activity = self._bars.add_task("", total=None, visible=False)
        self._tasks = [self._activity]
        self._quick_tasks: list[rich_progress.TaskID] = []
        self._doing = self._line = ""  # the activity; the newest line of a bar
        self._started = self._next = clock()
        self._wait = _FIRST_WAIT
        self._lock = threading.RLock()
        self._closing = contextlib.ExitStack()

    def _new_bars(self) -> rich_progress.Progress:
        return rich_progress.Progress(
            _Column(lambda task: Text(task.description, "bold")),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            _Column(lambda task: Text(task.fields["text"]() if "text" in task.fields else "")),
            rich_progress.TimeRemainingColumn(),
            console=self._console,
            disable=self._console.quiet or not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        if not self._inside:
            self._closing.enter_context(self._bars)
            if self._console.is_terminal:
                self._closing.enter_context(_logging_above_bars())
        if not self._console.quiet and not self._console.is_terminal:
            done = threading.Event()
            threading.Thread(target=self._keep_telling, args=(done,), daemon=True).start()
            self._closing.callback(done.set)
        if not self._console.quiet:
            _open.append(self)
            self._closing.callback(_open.remove, self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._inside:
            for task in self._tasks:
                self._bars.remove_task(task)
        self._closing.close()

    def doing(self, what: str, *, say: bool = True) -> None:
        """Show an activity, and how long it has taken so far, until a bar moves.

        Args:
          what: in words.
          say: write a line to a file at once; otherwise only if it takes long.
        """
        with self._lock:
            self._doing, self._started = what, self.clock()
            self._restart_wait()
        for task in self._quick_tasks:
            self._bars.update(task, visible=False)
        self._bars.update(
            self._activity, description=self._name, visible=True, text=self._activity_text
        )
        if say:
            self._print(what)

    def bar(self, name: str, total: int, unit: str, *, start: int = 0) -> "Bar":
        """A new bar.

        Args:
          name: what is done; may be empty.
          total: how many units there are.
          unit: in the plural.
          start: how many were done before.
        """
        bar = Bar(self, name, total, unit, start)
        if name:
            self._line = f"{name}: {total:,} {unit}"
            self._print(self._line)
            self._restart_wait()
        return bar

    def _add(
        self, description: str, total: int, start: int, text: Callable[[], str], quick: bool
    ) -> rich_progress.TaskID:
        shown = description or self._name
        task = self._bars.add_task(shown, total=total, completed=start, text=text)
        self._tasks.append(task)
        if quick:
            self._quick_tasks.append(task)
        return task

    def _moved(
        self, task: rich_progress.TaskID, done: int, line: str, *, ends: bool, quick: bool
    ) -> None:
        """A bar moved; a file gets its line at the first, the last and some between."""
        self._bars.update(task, completed=done, visible=not (quick and ends))
        with self._lock:
            first = bool(self._doing or not self._line) and not quick
            if not quick:
                self._doing = ""
                self._bars.update(self._activity, visible=False)
            self._line = line
            due = self.clock() >= self._next
            if due:
                self._lengthen_wait()
            elif first:
                self._restart_wait()
        if due or ((first or ends) and not quick):
            self._print(line)

    def tell(self) -> None:
        """Write a line to a file that has got none for a while."""
        with self._lock:
            if self.clock() < self._next:
                return
            self._lengthen_wait()
            text = self._activity_text() if self._doing else self._line
        if text:
            self._print(text)

    def _keep_telling(self, done: threading.Event) -> None:
        while not done.wait(1.0):
            self.tell()

    def _restart_wait(self) -> None:
        self._wait = _FIRST_WAIT
        self._next = self.clock() + self._wait

    def _lengthen_wait(self) -> None:
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._next = self.clock() + self._wait

    def _activity_text(self) -> str:
        seconds = self.clock() - self._started
        return f"{self._doing}, for {seconds:.0f} s so far" if seconds >= 1 else self._doing

    def _print(self, text: str) -> None:
        if not self._console.is_terminal:
            line = f"{self._name}: {text}" if self._name else text
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)


class Bar:
    """Work of which some units are done; see :meth:`Progress.bar`."""

    def __init__(
        self,
        progress: Progress,
        name: str,
        total: int,
        unit: str,
        start: int,
        quick: bool = False,
    ) -> None:
        self._progress, self._quick = progress, quick
        self._name, self._total, self._unit = name, total, unit
        self._done, self._text = start, ""
        self._first: tuple[float, int] | None = None  # the first move may include compilation
        self._id = progress._add(name, total, start, lambda: self._text, quick)

    def at(self, done: int, text: str = "") -> None:
        """Show that `done` units are done, and a few words beside it, such as the newest loss."""
        if done <= self._done:
            return
        self._done, now, left = done, self._progress.clock(), ""
        if self._first is None:
            self._first = now, done
        elif done > self._first[1]:
            rate = (done - self._first[1]) / max(now - self._first[0], 1e-9)
            left = f", {(self._total - done) / rate:.0f} s left" if done < self._total else ""
            text = text or f"{rate:,.1f} {self._unit}/s"
        self._text = text
        counted = f"{done:,} of {self._total:,} {self._unit}"
        named = f"{self._name}: {counted}" if self._name else counted
        line = f"{named}{'  ' * bool(text)}{text}{left}"
        ends = done == self._total
        self._progress._moved(self._id, done, line, ends=ends, quick=self._quick)

    def more(self, count: int) -> None:
        """Show that `count` more units are done."""
        self.at(self._done + count)


def quick_bar(name: str, total: int, unit: str) -> Bar:
    """A bar of work that is often quick: a file gets a line only if it takes long.

    It is drawn on the innermost :class:`Progress` that is shown; where there is none, nowhere.
    """
    progress = _open[-1] if _open else Progress(shown=False)
    return Bar(progress, name, total, unit, start=0, quick=True)


@contextlib.contextmanager
def _logging_above_bars() -> Iterator[None]:
    """Let handlers that write to stderr write above the bars, not into them."""
    changed = [
        (handler, handler.setStream(sys.stderr))
        for handler in logging.getLogger().handlers
        if type(handler) is logging.StreamHandler
    ]
    try:
        yield
    finally:
        for handler, stream in changed:
            if stream is not None:
                handler.setStream(stream)


class _Column(rich_progress.ProgressColumn):
    """A column whose text is computed again at every refresh."""

    max_refresh = None

    def __init__(self, text: Callable[[rich_progress.Task], Text]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: rich_progress.Task) -> Text:
        """The column's text now."""
        return self._text(task)
