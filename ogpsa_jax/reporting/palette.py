"""Colours of the figures, on white and on dark ground."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ogpsa_jax.runs import BASE, NAIVE


@dataclass(frozen=True)
class Palette:
    """What a figure is drawn in.

    Attributes:
      style: of matplotlib.
      ground: behind everything.
      grid: lines behind the points.
      faint: text that is not the matter.
      fixed: colours of the methods that most reports contain, so that figures read side by side.
      free: colours of all other methods, in their order.
    """

    style: str
    ground: str
    grid: str
    faint: str
    fixed: dict[str, str]
    free: tuple[str, ...]

    def of(self, methods: Sequence[str]) -> dict[str, str]:
        """The colour of each method."""
        others = [m for m in dict.fromkeys(methods) if m not in self.fixed]
        free = {method: self.free[i % len(self.free)] for i, method in enumerate(others)}
        return {method: {**self.fixed, **free}[method] for method in dict.fromkeys(methods)}

    @contextmanager
    def figure(self, **settings: Any) -> Iterator[Any]:
        """A new figure, and matplotlib's settings for what is drawn on it."""
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.style import context

        with (
            context(self.style),
            matplotlib.rc_context({"font.size": FONT, "axes.facecolor": self.ground}),
        ):
            yield Figure(facecolor=self.ground, dpi=DPI, layout="constrained", **settings)


# Okabe and Ito's colours, told apart by readers with any colour vision; then darker shades.
LIGHT = Palette(
    style="default",
    ground="#ffffff",
    grid="#e4e4e4",
    faint="#666666",
    fixed={
        BASE: "#000000",
        NAIVE: "#D55E00",
        "ogpsa-recommended": "#009E73",
        "ogpsa-paper": "#E69F00",
        "mixing": "#CC79A7",
        "merge": "#0072B2",
    },
    free=("#56B4E9", "#8B5E00", "#5B4EA3", "#7A9A01", "#7F7F7F"),
)
# The same, lighter; the ground is that of the page.
DARK = Palette(
    style="dark_background",
    ground="#16181c",
    grid="#33363c",
    faint="#a0a4ab",
    fixed={
        BASE: "#ffffff",
        NAIVE: "#FF8A3D",
        "ogpsa-recommended": "#2ECBA1",
        "ogpsa-paper": "#F2B632",
        "mixing": "#E79BC6",
        "merge": "#3F9FEA",
    },
    free=("#9AD6F9", "#C4914A", "#A99BF5", "#A9CC3F", "#B4B4B4"),
)
# A figure 7 inches wide that a phone shows 390 pixels wide has letters of 10 pixels.
WIDTH = 7.0
FONT = 15.0
DPI = 160
