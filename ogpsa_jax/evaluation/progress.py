"""Progress on stderr: a bar for each task on a terminal, lines in a file, or nothing."""

import time
from collections.abc import Callable
from types import TracebackType

from rich import progress
from rich.console import Console

_BETWEEN = 60.0  # seconds between two lines of a task in a file, at least


class Bar:
    """What is done of one task."""

    def __init__(self, bars: "Progress", name: str, total: int) -> None:
        self._bars, self._name, self._total = bars, name, total
        self._id = bars.rich.add_task(name, total=total)
        self._count = 0
        self._told = bars.clock()
        bars.say(f"{name}: {total} items")

    def at(self, count: int) -> None:
        """So many are done."""
        before, self._count = self._count, count
        self._bars.rich.update(self._id, completed=count)
        now = self._bars.clock()
        finished = before < count == self._total
        if finished or (count > before and now - self._told >= _BETWEEN):
            self._told = now
            self._bars.say(f"{self._name}: {count}/{self._total}")

    def more(self, count: int) -> None:
        """So many more are done."""
        self.at(self._count + count)


class Progress:
    """A stack of bars, shown while the ``with`` block runs.

    Args:
      shown: show them; otherwise every call does nothing.
      clock: gives seconds.
    """

    def __init__(self, shown: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._console = Console(stderr=True, quiet=not shown)
        self._lines = shown and not self._console.is_terminal
        self.rich = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            console=self._console,
            disable=not shown or self._lines,
        )

    def task(self, name: str, total: int) -> Bar:
        """A new bar."""
        return Bar(self, name, total)

    def say(self, text: str) -> None:
        """Write a line, unless there are bars."""
        if self._lines:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> "Progress":
        self.rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.rich.stop()
