"""The safety–utility table: one list of cells, written as text, Markdown or CSV."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from ogpsa_jax.reporting.rows import HEADLINE, ROUND_OFF, ScoreRow, aggregate
from ogpsa_jax.runs import BASE, NAIVE, ScoreRecord

_HEADING_WIDTH = 12  # in a terminal, where long headings are wrapped
TEXT_COLUMNS = 2  # method and stage; what follows are numbers, aligned to the right
SPREAD_NOTE = (
    "± is the standard deviation over seeds; where there is one seed, the standard error over the "
    "items scored. A figure that is the same for every seed, or of one document, has none."
)


def heading(name: str) -> str:
    """A score as tables call it."""
    return name.replace("_", " ")


def _columns(
    rows: list[ScoreRow], every_score: bool
) -> list[tuple[str, Callable[[ScoreRow], str]]]:
    """Headings and what stands under them."""
    names = [name for name in HEADLINE if any(name in row.mean for row in rows)]
    if every_score:
        names += sorted({name for row in rows for name in row.mean} - set(HEADLINE))

    def score(name: str) -> Callable[[ScoreRow], str]:
        return lambda row: with_spread(row.mean.get(name), row.spread.get(name))

    columns: list[tuple[str, Callable[[ScoreRow], str]]] = [
        ("method", lambda row: row.label),
        ("stage", lambda row: row.stage),
        ("seeds", lambda row: str(row.seeds)),
        *((heading(name), score(name)) for name in names),
    ]
    if any(row.method not in (BASE, NAIVE) for row in rows):
        columns.append(("tax removed", _tax_text))
    if any(row.training_samples for row in rows):
        columns.append(("samples", _samples_text))
    if any(row.seconds for row in rows):
        columns.append(("seconds", lambda row: f"{row.seconds:,.0f}"))
    return columns


def with_spread(mean: float | None, spread: float | None) -> str:
    """A score as text, with its spread where there is one."""
    if mean is None:
        return "–"
    if spread is None or math.isnan(spread) or spread <= ROUND_OFF:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {spread:.3f}" if spread >= 5e-4 else f"{mean:.3f} ± <0.001"


def _tax_text(row: ScoreRow) -> str:
    return "–" if row.tax_removed is None else f"{row.tax_removed:.0%}"


def _samples_text(row: ScoreRow) -> str:
    """Training samples, and reference samples where there are any."""
    training, reference = f"{row.training_samples:,.0f}", f"{row.reference_samples:,.0f}"
    return training if not row.reference_samples else f"{training} + {reference}"


def table_cells(
    records: Sequence[ScoreRecord],
    matched_safety: float | None = None,
    every_score: bool = False,
) -> list[list[str]]:
    """The table as rows of cells, headings first; what every form of it is made from.

    Args:
      records: of any runs.
      matched_safety: see :func:`aggregate`.
      every_score: show all scores, not only the headline ones.
    """
    rows = aggregate(records, matched_safety)
    columns = _columns(rows, every_score)
    return [
        [title for title, _ in columns],
        *([cell(row) for _, cell in columns] for row in rows),
    ]


def text_table(records: Sequence[ScoreRecord], matched_safety: float | None = None) -> str:
    """The table for a terminal; arguments as for :func:`table_cells`."""
    cells = table_cells(records, matched_safety)
    return _written(cells, "simple", TEXT_COLUMNS, maxheadercolwidths=_HEADING_WIDTH)


def markdown_table(records: Sequence[ScoreRecord], matched_safety: float | None = None) -> str:
    """The table in Markdown; arguments as for :func:`table_cells`."""
    return markdown_cells(table_cells(records, matched_safety), TEXT_COLUMNS)


def markdown_cells(cells: Sequence[Sequence[str]], text_columns: int) -> str:
    """Any cells as a table in Markdown.

    Args:
      cells: rows of equal length, headings first.
      text_columns: how many columns are aligned to the left; those after them to the right.
    """
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    return _written(escaped, "pipe", text_columns)


def _written(cells: Sequence[Sequence[str]], style: str, text_columns: int, **more: Any) -> str:
    headings, *rows = cells
    align = ["left"] * text_columns + ["right"] * (len(headings) - text_columns)
    told = {"tablefmt": style, "disable_numparse": True, "colalign": align}
    return str(tabulate(rows, headings, **told, **more))


def csv_table(records: Sequence[ScoreRecord], matched_safety: float | None = None) -> str:
    """Every score in full precision, one line per row of the table, as CSV.

    Args:
      records: of any runs.
      matched_safety: see :func:`aggregate`.
    """
    rows = aggregate(records, matched_safety)
    present = {name for row in rows for name in row.mean}
    names = [name for name in HEADLINE if name in present] + sorted(present - set(HEADLINE))
    plain = ("label", "method", "stage", "seeds")
    outcome = ("tax_removed", "tax_note", "training_samples", "reference_samples", "seconds")
    scores = [part for name in names for part in (name, f"{name}_spread")]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*plain, *scores, *outcome], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        spreads = {f"{name}_spread": value for name, value in row.spread.items()}
        others = {name: getattr(row, name) for name in (*plain, *outcome)}
        values = {**row.mean, **spreads, **others}
        writer.writerow({name: _full(value) for name, value in values.items()})
    return out.getvalue()


def _full(value: float | str | None) -> float | str:
    """As CSV contains it: nothing for what was not measured."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
