"""Scores of safety and general ability, and the harness adapter."""

from ogpsa_jax.evaluation.evaluate import evaluate, results_text
from ogpsa_jax.evaluation.language_model import ModelOptions
from ogpsa_jax.evaluation.refusal import classify_refusal, is_refusal

__all__ = ["ModelOptions", "classify_refusal", "evaluate", "is_refusal", "results_text"]
