"""Figures of what was measured along the way."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

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
    colours = palette.of([methods.get(label, label) for label in curves])
    looks: dict[str, tuple[str, str]] = {}
    for label in curves:  # runs of one method share a colour
        colour = colours[methods.get(label, label)]
        shared = sum(other == colour for other, _ in looks.values())
        looks[label] = colour, _STYLES[shared % len(_STYLES)]
    rows, columns = (len(measures) + 1) // 2, min(len(measures), 2)
    height = _PANEL * rows + _LINE * ((len(curves) + 1) // 2)
    with palette.figure(figsize=(WIDTH, height)) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        for axes, measure in zip(panels, measures, strict=False):
            for label, own in curves.items():
                if points := own.get(measure):
                    colour, style = looks[label]
                    axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=2)
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
        for axes in list(panels):  # of an odd number, the last place stays empty
            axes.set_visible(False)
        handles = [
            Line2D([], [], color=colour, linestyle=style, linewidth=2, label=label)
            for label, (colour, style) in looks.items()
        ]
        legend = figure.legend(
            handles=handles, loc="outside lower left", ncols=2, frameon=False, fontsize=FONT - 2
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure
