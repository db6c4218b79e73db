"""Figures of what was measured along the way."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ogpsa_jax.reporting.evidence import REMOVED
from ogpsa_jax.reporting.palette import FONT, LIGHT, WIDTH, Palette

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL, _LINE = 3.4, 0.31  # heights of a panel and of a line of the legend, in inches
_TITLE_LETTERS = 26  # a line
_STYLES = ("-", "--", ":", "-.")


def curves_figure(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    methods: Mapping[str, str],
    palette: Palette = LIGHT,
) -> "Figure":
    """A panel for each measure, under its name, with a line for each run that has it.

    Args:
      curves: by label and measure, (step, value).
      methods: of labels; decide the colours.
      palette: of the colours.
    """
    from matplotlib.lines import Line2D

    measures = list(dict.fromkeys(name for own in curves.values() for name in own))
    looks = _looks(curves, methods, palette)
    rows, columns = (len(measures) + 1) // 2, min(len(measures), 2)
    height = _PANEL * rows + _LINE * ((len(curves) + 1) // 2)
    with palette.figure(figsize=(WIDTH, height)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for measure, axes in zip(measures, panels, strict=False):
            for label, own in curves.items():
                if points := own.get(measure):
                    axes.plot(*zip(*points, strict=True), linewidth=2, **looks[label])
            _dress(axes, measure, palette)
        for axes in list(panels):  # of an odd number, the last place stays empty
            axes.set_visible(False)
        handles = [
            Line2D([], [], linewidth=2, label=label, **look) for label, look in looks.items()
        ]
        legend = figure.legend(
            handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=FONT - 2
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _looks(
    curves: Mapping[str, Any], methods: Mapping[str, str], palette: Palette
) -> dict[str, dict[str, Any]]:
    """Colour and style of each run's lines: runs of one method share the colour alone."""
    colours = palette.of([methods.get(label, label) for label in curves])
    found: dict[str, dict[str, Any]] = {}
    for label in curves:
        colour = colours[methods.get(label, label)]
        shared = sum(look["color"] == colour for look in found.values())
        found[label] = {"color": colour, "linestyle": _STYLES[shared % len(_STYLES)]}
    return found


def _dress(axes: Any, measure: str, palette: Palette) -> None:
    title = textwrap.fill(measure, _TITLE_LETTERS)
    axes.set_title(title, fontsize=FONT - 2, loc="left", parse_math=False)
    axes.set_xlabel("step", fontsize=FONT - 2)
    if measure == REMOVED:
        axes.set_yscale("symlog", linthresh=1e-3)
    else:
        axes.set_yscale("log")
    axes.tick_params(labelsize=FONT - 3)
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
