"""Scores of safety and general ability, and the harness adapter."""

from ogpsa_jax.evaluation.evaluate import evaluate, results_text
from ogpsa_jax.evaluation.records import Cost, Record, read_records, write_records
from ogpsa_jax.evaluation.refusal import classify_refusal, is_refusal

__all__ = [
    "Cost",
    "Record",
    "classify_refusal",
    "evaluate",
    "is_refusal",
    "read_records",
    "results_text",
    "write_records",
]
