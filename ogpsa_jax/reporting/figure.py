"""The safety–utility figure: safety against general score, as in the paper, and helpfulness."""

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ogpsa_jax.reporting.labels import OVERHANG, Label, place_labels
from ogpsa_jax.reporting.palette import FONT, LIGHT, WIDTH, Palette
from ogpsa_jax.reporting.rows import ScoreRow, aggregate, safety_score
from ogpsa_jax.runs import BASE, ScoreRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "D", "^", "v", "P")
_ON_TOP = "ogpsa-recommended"  # drawn over the others where they meet
# What the second panel shows, if all have it: the score, its name, and where is better.
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
_TITLE_LETTERS = 52  # a line
_NAME_LETTERS = 24  # a line of the legend or beside an axis
_HEIGHT = 3.6  # of the pictures alone, in inches
_LINE = 0.31  # of the legend or the title


def pareto_figure(
    records: Sequence[ScoreRecord],
    title: str | None = None,
    matched_safety: float | None = None,
    palette: Palette = LIGHT,
) -> "Figure":
    """Safety against general score, and beside it what became of harmless requests.

    A colour and a number is a method, a marker a stage; numbers stand beside points, names below.
    Settings of one method at one stage (weights of a merge, say) are joined by a line. Bars are the
    spread that the table gives. The second picture is there if all records have benign compliance,
    or all over-refusal.

    Args:
      records: of any runs; those without a general or a safety score are left out.
      title: what the picture shows, as in :func:`~ogpsa_jax.reporting.finding.finding`.
      matched_safety: a safety score at which a dashed line is drawn.
      palette: of the colours.

    Returns:
      A matplotlib figure; ``savefig`` writes it.

    Raises:
      ValueError: no record has both scores.
    """
    rows, pictures = _drawn(records)
    lines = textwrap.wrap(title or "", _TITLE_LETTERS)
    entries = len(_names(rows)) + len(_stages(rows)) + (matched_safety is not None)
    height = _HEIGHT + _LINE * (len(lines) + (entries + 1) // 2)
    with palette.figure(figsize=(WIDTH, height)) as figure:
        panels = figure.subplots(1, len(pictures), squeeze=False)[0]
        for axes, (score, name, better) in zip(panels, pictures, strict=True):
            _panel(axes, rows, score, name, better, palette)
        if matched_safety is not None:
            look = {"color": palette.faint, "linewidth": 1, "linestyle": "--"}
            panels[0].axhline(matched_safety, zorder=1, **look)
        _legend(figure, rows, matched_safety, palette)
        if lines:
            figure.suptitle(
                "\n".join(lines), x=0.01, ha="left", fontsize=FONT + 1, parse_math=False
            )
        for axes, (score, *_) in zip(panels, pictures, strict=True):
            place_labels(axes, _labels(rows, score, palette), FONT - 2)
    return figure


def _drawn(records: Sequence[ScoreRecord]) -> tuple[list[ScoreRow], list[tuple[str, str, str]]]:
    """What is drawn: rows, and of each picture the score, its name and where is better."""
    rows = [row for row in aggregate(records) if "general" in row.mean]
    safety = safety_score(name for row in rows for name in row.mean)
    rows = [row for row in rows if safety in row.mean]
    if safety is None or not rows:
        raise ValueError("records must contain a general and a safety score, none of them does")
    pictures = [(safety, "safety score", "better ↗")]
    pictures += [each for each in _SECOND if all(each[0] in row.mean for row in rows)][:1]
    return rows, pictures


def _panel(
    axes: Any, rows: list[ScoreRow], score: str, name: str, better: str, palette: Palette
) -> None:
    """One score of all rows against the general one."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    stages = _stages(rows)
    for method, colour in palette.of([row.method for row in rows]).items():
        for stage in dict.fromkeys(row.stage for row in rows if row.method == method):
            series = [row for row in rows if (row.method, row.stage) == (method, stage)]
            marker = "*" if method == BASE else _MARKERS[stages.index(stage) % len(_MARKERS)]
            _draw(axes, series, score, colour, marker)
    axes.set_xlabel("general score")
    axes.set_ylabel(textwrap.fill(name, _NAME_LETTERS + 2))
    for axis, ticks in ((axes.xaxis, 4), (axes.yaxis, 5)):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 2):g}%"))
        axis.set_major_locator(MaxNLocator(nbins=ticks, steps=[1, 2, 2.5, 5, 10]))
        axis.set_tick_params(labelsize=FONT - 1)
    axes.set_xlim(*axis_limits(rows, "general"))
    axes.set_ylim(*axis_limits(rows, score))
    axes.grid(color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    where = {"xycoords": "axes fraction", "xytext": (0, OVERHANG), "textcoords": "offset points"}
    look = {"ha": "right", "va": "bottom", "fontsize": FONT - 2, "color": palette.faint}
    axes.annotate(better, (1, 1), **where, **look)


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


def _stages(rows: Sequence[ScoreRow]) -> list[str]:
    return list(dict.fromkeys(row.stage for row in rows if row.method != BASE))


def _names(rows: Sequence[ScoreRow]) -> dict[str, str]:
    """How the legend calls each method: the label, with its number; of several labels, the method.

    Points of a method with several labels carry what the labels differ in, and no number.
    """
    labels = {row.method: list[str]() for row in rows}
    for row in rows:
        labels[row.method].append(row.label)
    names, number = {}, itertools.count(1)
    for method, found in labels.items():
        one = len(set(found)) == 1
        names[method] = f"{next(number)}  {found[0]}" if one else method
    return names


def _labels(rows: list[ScoreRow], score: str, palette: Palette) -> list[Label]:
    """What stands beside each point."""
    names, colours = _names(rows), palette.of([row.method for row in rows])
    texts = []
    for row in rows:
        own = [other.label for other in rows if other.method == row.method]
        shared = _shared_words(own)
        setting = " ".join(row.label.split()[shared:]) or row.label
        texts.append(names[row.method].split()[0] if len(set(own)) == 1 else setting)
    return [
        Label(text, row.mean["general"], row.mean[score], colours[row.method])
        for text, row in zip(texts, rows, strict=True)
    ]


def _draw(axes: Any, series: list[ScoreRow], score: str, colour: str, marker: str) -> None:
    """A score of one method and stage."""
    series = sorted(series, key=lambda row: row.mean["general"])
    x = [row.mean["general"] for row in series]
    y = [row.mean[score] for row in series]
    method = series[0].method
    depth = 3.0 + 0.4 * (method == BASE) + 0.6 * (method == _ON_TOP) - 0.4 * (len(series) > 1)
    if len(series) > 1:
        axes.plot(x, y, color=colour, linewidth=1.4, alpha=0.6, zorder=2)
    axes.errorbar(
        x,
        y,
        xerr=_within_scale(x, [row.spread.get("general", 0.0) for row in series]),
        yerr=_within_scale(y, [row.spread.get(score, 0.0) for row in series]),
        fmt=marker,
        color=colour,
        markersize=14 if marker == "*" else 10,
        markeredgecolor=axes.get_facecolor(),
        markeredgewidth=1,
        elinewidth=1.2,
        zorder=depth,
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


def _legend(
    figure: Any, rows: list[ScoreRow], matched_safety: float | None, palette: Palette
) -> None:
    """The names of methods and stages, below the pictures."""
    from matplotlib.lines import Line2D

    colours, stages = palette.of([row.method for row in rows]), _stages(rows)
    entries = [
        (textwrap.fill(name, _NAME_LETTERS + 4), colours[method], "*" if method == BASE else "o")
        for method, name in _names(rows).items()
    ]
    if len(stages) > 1:
        markers = zip(stages, itertools.cycle(_MARKERS), strict=False)
        entries += [(f"stage: {stage}", palette.faint, marker) for stage, marker in markers]
    handles = [
        Line2D([], [], label=name, color=colour, marker=marker, linestyle="none", markersize=10)
        for name, colour, marker in entries
    ]
    if matched_safety is not None:
        named = f"safety to match: {round(100 * matched_safety, 2):g}%"
        handles.append(Line2D([], [], label=named, color=palette.faint, linestyle="--"))
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=2,
        frameon=False,
        fontsize=FONT - 1,
        handlelength=1.4,
        columnspacing=1.0,
        handletextpad=0.5,
        labelspacing=0.35,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a label may contain a dollar
