"""The safety–utility table, figure and page over any scored runs."""

from ogpsa_jax.reporting.comparability import to_mind
from ogpsa_jax.reporting.figure import pareto_figure
from ogpsa_jax.reporting.page import cells_html, figure_html, html_page, table_html
from ogpsa_jax.reporting.report import explanation_html, report
from ogpsa_jax.reporting.rows import aggregate
from ogpsa_jax.reporting.tables import csv_table, markdown_table, text_table

__all__ = [
    "aggregate",
    "cells_html",
    "csv_table",
    "explanation_html",
    "figure_html",
    "html_page",
    "markdown_table",
    "pareto_figure",
    "report",
    "table_html",
    "text_table",
    "to_mind",
]
