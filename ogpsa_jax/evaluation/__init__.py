"""Safety and capability scores, the harness adapter, the safety–utility report."""

from ogpsa_jax.evaluation.asking import to_mind
from ogpsa_jax.evaluation.evaluate import evaluate, results_text
from ogpsa_jax.evaluation.figure import pareto_figure
from ogpsa_jax.evaluation.page import cells_html, figure_html, html_page, table_html
from ogpsa_jax.evaluation.records import Cost, Record, read_records, write_records
from ogpsa_jax.evaluation.refusal import classify_refusal, is_refusal
from ogpsa_jax.evaluation.report import explanation_html, report
from ogpsa_jax.evaluation.tables import aggregate, csv_table, markdown_table, text_table

__all__ = [
    "Cost",
    "Record",
    "aggregate",
    "cells_html",
    "classify_refusal",
    "csv_table",
    "evaluate",
    "explanation_html",
    "figure_html",
    "html_page",
    "is_refusal",
    "markdown_table",
    "pareto_figure",
    "read_records",
    "report",
    "results_text",
    "table_html",
    "text_table",
    "to_mind",
    "write_records",
]
