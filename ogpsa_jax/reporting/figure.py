"""The safety–utility figure: safety against general score, as in the paper, and helpfulness."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ogpsa_jax.evaluation.records import BASE, NAIVE, Record
from ogpsa_jax.reporting.rows import ScoreRow, aggregate, safety_score

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by readers with any colour vision; then three darker shades.
# Methods that most reports hold have theirs always, so that figures can be read side by side.
_FIXED_COLOURS = {
    BASE: "#000000",
    NAIVE: "#D55E00",
    "ogpsa-recommended": "#009E73",
    "ogpsa-paper": "#E69F00",
    "mixing": "#CC79A7",
    "merge": "#0072B2",
}
_COLOURS = ("#56B4E9", "#8B5E00", "#5B4EA3", "#7A9A01", "#7F7F7F")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_ON_TOP = "ogpsa-recommended"  # drawn over the others where they meet
# What the second picture shows, if all have it: the score, its name, and where is better.
_SECOND = (
    ("benign_compliance", "harmless requests answered", "better ↗"),
    ("exact_benign_compliance", "harmless requests answered rightly", "better ↗"),
    ("over_refusal", "harmless requests refused", "better ↘"),
    ("prefix_over_refusal", "harmless requests refused", "better ↘"),
)
# An axis is at least so long: ten times the widest spread, so that differences of one spread, which
# may be chance, are a tenth of it; and a twentieth of the scale where there are no spreads.
_SPREADS = 10
_SHORTEST = 0.05
_MARGIN = 0.08


def pareto_figure(
    records: Sequence[Record], title: str | None = None, matched_safety: float | None = None
) -> "Figure":
    """Safety against general score, and beside it what became of harmless requests.

    A colour is a method, a marker a stage. Settings of one method at one stage (weights of a merge,
    say) are joined by a line. Bars are the spread that the table gives. The second picture is there
    if all records have benign compliance, or all over-refusal.

    Args:
      records: of any runs; those without a general or a safety score are left out.
      title: put above the axes.
      matched_safety: a safety score at which a dashed line is drawn.

    Returns:
      A matplotlib figure; ``savefig`` writes it.

    Raises:
      ValueError: no record has both scores.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    rows = [row for row in aggregate(records) if "general" in row.mean]
    safety = safety_score(name for row in rows for name in row.mean)
    rows = [row for row in rows if safety in row.mean]
    if safety is None or not rows:
        raise ValueError("records must hold a general and a safety score, none of them does")
    pictures = [(safety, "safety score", "better ↗")]
    pictures += [each for each in _SECOND if all(each[0] in row.mean for row in rows)][:1]
    figure = Figure(figsize=(3.6 + 4.6 * len(pictures), 4.8), dpi=160, layout="constrained")
    stages = list(dict.fromkeys(row.stage for row in rows if row.method != BASE))
    panels = figure.subplots(1, len(pictures), squeeze=False)[0]
    for axes, (score, name, better) in zip(panels, pictures, strict=True):
        for method, colour in _colours(rows).items():
            for stage in dict.fromkeys(row.stage for row in rows if row.method == method):
                series = [row for row in rows if (row.method, row.stage) == (method, stage)]
                marker = "*" if method == BASE else _MARKERS[stages.index(stage) % len(_MARKERS)]
                above = method != BASE and stages.index(stage) % 2 == 1
                _draw(axes, series, score, colour, marker, above)
        axes.set_xlabel("general score")
        axes.set_ylabel(name)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(xmax=1.0))
            axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axes.set_xlim(*axis_limits(rows, "general"))
        axes.set_ylim(*axis_limits(rows, score))
        axes.grid(color="#E4E4E4", linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.annotate(
            better,
            (1, 1),
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            fontsize=8,
            color="#666666",
        )
    _legend(panels[-1], rows, stages)
    if matched_safety is not None:
        panels[0].axhline(matched_safety, color="#888888", linewidth=0.8, linestyle="--", zorder=1)
    if title:
        panels[0].set_title(title, loc="left", fontsize=11)
    return figure


def axis_limits(rows: Sequence[ScoreRow], score: str) -> tuple[float, float]:
    """Ends of an axis on which noise does not look like a gap.

    Args:
      rows: what is drawn; all have the score.
      score: along the axis.
    """
    bars = [(row.mean[score], row.spread.get(score, 0.0)) for row in rows]
    low = min(value - spread for value, spread in bars)
    high = max(value + spread for value, spread in bars)
    inside = all(0 <= value <= 1 for value, _ in bars)
    if inside:  # bars are drawn to the ends of the scale alone
        low, high = max(low, 0.0), min(high, 1.0)
    span = max(high - low, _SPREADS * max(spread for _, spread in bars), _SHORTEST)
    if inside:
        span = min(span, 1.0)
    centre = (low + high) / 2
    if inside:  # room that lies outside the scale is given to the other side
        centre = min(max(centre, span / 2), 1 - span / 2)
    half = span * (0.5 + _MARGIN)
    return centre - half, centre + half


def _colours(rows: list[ScoreRow]) -> dict[str, str]:
    methods = list(dict.fromkeys(row.method for row in rows))
    free = [method for method in methods if method not in _FIXED_COLOURS]
    others = {method: _COLOURS[i % len(_COLOURS)] for i, method in enumerate(free)}
    return {method: {**_FIXED_COLOURS, **others}[method] for method in methods}


def _draw(  # type: ignore[no-untyped-def]
    axes, series: list[ScoreRow], score: str, colour: str, marker: str, above: bool
) -> None:
    """A score of one method and stage; `above`: the labels stand above the points."""
    series = sorted(series, key=lambda row: row.mean["general"])
    x = [row.mean["general"] for row in series]
    y = [row.mean[score] for row in series]
    front = 0.5 * (series[0].method == _ON_TOP)
    if len(series) > 1:
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.6, zorder=2)
    axes.errorbar(
        x,
        y,
        xerr=_within_scale(x, [row.spread.get("general", 0.0) for row in series]),
        yerr=_within_scale(y, [row.spread.get(score, 0.0) for row in series]),
        fmt=marker,
        color=colour,
        markersize=11 if marker == "*" else 7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        elinewidth=0.9,
        alpha=0.95,
        zorder=3 + front,
    )
    if len(series) > 1:
        shared = _shared_words([row.label for row in series])
        for row, at_x, at_y in zip(series, x, y, strict=True):
            text = " ".join(row.label.split()[shared:]) or row.label
            axes.annotate(
                text,
                (at_x, at_y),
                xytext=(5, 6 if above else -11),
                textcoords="offset points",
                fontsize=7,
                color=colour,
                parse_math=False,
            )


def _within_scale(values: list[float], spread: list[float]) -> list[list[float]]:
    """Lower and upper lengths of bars that do not leave the scale from 0 to 1."""
    pairs = list(zip(values, spread, strict=True))
    lower = [max(min(length, value), 0.0) for value, length in pairs]
    return [lower, [max(min(length, 1 - value), 0.0) for value, length in pairs]]


def _shared_words(labels: list[str]) -> int:
    """How many words all labels begin with."""
    columns = zip(*(label.split() for label in labels), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _legend(axes, rows: list[ScoreRow], stages: list[str]) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.lines import Line2D

    handles = []
    for method, colour in _colours(rows).items():
        labels = list(dict.fromkeys(row.label for row in rows if row.method == method))
        name = labels[0] if len(labels) == 1 else method
        marker = "*" if method == BASE else "o"
        handles.append(
            Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=name)
        )
    if len(stages) > 1:
        handles += [
            Line2D(
                [],
                [],
                color="#888888",
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle="none",
                markersize=6,
                label=f"stage: {stage}",
            )
            for i, stage in enumerate(stages)
        ]
    legend = axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may hold a dollar
