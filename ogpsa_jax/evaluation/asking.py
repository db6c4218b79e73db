"""How a model was asked.

A score depends on the words around a question and on where an answer ends, as much as on the
weights: ``results.json`` keeps both, and a report says where they differ.
"""

import hashlib
from typing import Any

from ogpsa_jax.evaluation.language_model import LanguageModel

PLAIN = "none"  # the template of a model that continues texts


def asking(model: LanguageModel, chat: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """What ``results.json`` says of how a model was asked, and the short form in its record.

    Args:
      model: what was asked.
      chat: whether any of it was asked as a user's turn.

    Returns:
      ``template`` (its text, or None) and ``stop_tokens`` (their texts); the same as a digest and
      as one text, which are equal where the former are.
    """
    template = model.template if chat else None
    full = {"template": template, "stop_tokens": list(model.stops)}
    short = PLAIN if template is None else hashlib.sha256(template.encode()).hexdigest()[:12]
    return full, {"template": short, "stop_tokens": " ".join(model.stops)}
