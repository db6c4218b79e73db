"""The safety–utility table, figure and page over any scored runs."""

from ogpsa_jax.reporting.comparability import to_mind
from ogpsa_jax.reporting.figure import pareto_figure
from ogpsa_jax.reporting.finding import finding
from ogpsa_jax.reporting.report import report
from ogpsa_jax.reporting.rows import aggregate
from ogpsa_jax.reporting.tables import csv_table, markdown_table, text_table

__all__ = [
    "aggregate",
    "csv_table",
    "finding",
    "markdown_table",
    "pareto_figure",
    "report",
    "text_table",
    "to_mind",
]
