"""What a person sees while a run goes: a bar on a terminal, plain lines in a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ogpsa_jax.training.metrics import Line


class Progress:
    """Steps done, rate and time left, with the newest loss and removed fraction."""

    def __init__(self, name: str, total: int, start: int) -> None:
        self._console = Console(stderr=True)
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._name, self._total, self._start = name, total, start
        self._task = self._bar.add_task(name, total=total, completed=start, shown="compiling")
        self._clock: float | None = None
        self._first = start
        self._units = 0.0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, line: Line) -> None:
        """Show that the step of this metrics line is done."""
        now = time.perf_counter()
        self._units += line["weight"]
        if self._clock is None:  # the first lines include compilation: the rate starts after them
            self._clock, self._units, self._first = now, 0.0, line["step"]
        seconds = now - self._clock
        shown = f"loss {line['loss']:.4f}"
        if "removed_fraction" in line:
            shown += f"  removed {line['removed_fraction']:.2%}"
        if seconds > 0 and line["step"] > self._first:
            rate = (line["step"] - self._first) / seconds
            left = (self._total - line["step"]) / rate
            shown += f"  {self._units / seconds:,.0f} targets/s"
            remaining = f", {left:.0f} s left"
        else:
            remaining = ""
        self._bar.update(self._task, completed=line["step"], shown=shown)
        if not self._console.is_terminal and (
            line["step"] == self._total or line["step"] % max(self._total // 20, 1) == 0
        ):
            self._console.print(
                f"{self._name}: step {line['step']}/{self._total}  {shown}{remaining}",
                highlight=False,
                soft_wrap=True,
            )
