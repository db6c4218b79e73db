"""Progress bars on stderr, one per task; none where they are not wanted."""

from types import TracebackType


class Bar:
    """The bar of one task."""

    def __init__(self, bars: "Progress", name: str, total: int) -> None:
        self._rich = bars.rich
        self._id = None if self._rich is None else self._rich.add_task(name, total=total)

    def at(self, count: int) -> None:
        """So many are done."""
        if self._rich is not None and self._id is not None:
            self._rich.update(self._id, completed=count)

    def more(self, count: int) -> None:
        """So many more are done."""
        if self._rich is not None and self._id is not None:
            self._rich.advance(self._id, count)


class Progress:
    """A stack of bars, shown while the ``with`` block runs.

    Args:
      shown: draw them; otherwise every call does nothing.
    """

    def __init__(self, shown: bool) -> None:
        self.rich = None
        if shown:
            from rich import progress
            from rich.console import Console

            self.rich = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def task(self, name: str, total: int) -> Bar:
        """A new bar."""
        return Bar(self, name, total)

    def __enter__(self) -> "Progress":
        if self.rich is not None:
            self.rich.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.rich is not None:
            self.rich.stop()
