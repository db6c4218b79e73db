"""What a person sees while a run goes: a bar on a terminal, plain lines in a file."""

import time
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ogpsa_jax.training.metrics import Line


class Progress:
    """Steps done, rate and time left, with the newest loss and removed fraction."""

    def __init__(self, name: str, total: int, start: int) -> None:
        # Of several processes the first alone speaks.
        self._console = Console(stderr=True, quiet=jax.process_index() > 0)
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._console.quiet or not self._console.is_terminal,
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

    def add(self, lines: Sequence[Line]) -> None:
        """Show that the steps of these metrics lines are done, by now."""
        if not lines:
            return
        now, line = time.perf_counter(), lines[-1]
        shown = f"loss {line['loss']:.4f}"
        if "removed_fraction" in line:
            shown += f"  removed {line['removed_fraction']:.2%}"
        left = ""
        if self._clock is None:  # the first lines include compilation: the rate starts after them
            self._clock, self._first = now, line["step"]
        else:
            self._units += sum(each["weight"] for each in lines)
            seconds = now - self._clock
            shown += f"  {self._units / seconds:,.0f} targets/s"
            rest = seconds / (line["step"] - self._first) * (self._total - line["step"])
            left = f", {rest:.0f} s left"
        self._bar.update(self._task, completed=line["step"], shown=shown)
        if not self._console.is_terminal and self._due(lines):
            self._console.print(
                f"{self._name}: step {line['step']}/{self._total}  {shown}{left}",
                highlight=False,
                soft_wrap=True,
            )

    def _due(self, lines: Sequence[Line]) -> bool:
        """Whether these steps pass one of the twenty marks at which a file gets a line."""
        every = max(self._total // 20, 1)
        return any(line["step"] in (self._total, self._start + 1) for line in lines) or (
            lines[-1]["step"] // every > (lines[0]["step"] - 1) // every
        )
