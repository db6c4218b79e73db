"""How a model was asked, and whether the rows of a report were asked alike.

A score depends on the words around a question and on where an answer ends, as much as on the
weights: ``results.json`` keeps both, and a report says where they differ.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from ogpsa_jax.evaluation.language_model import LanguageModel
from ogpsa_jax.evaluation.records import Record

PLAIN = "none"  # the template of a model that is given texts to go on with
_WORDS = {"template": "chat templates", "stop_tokens": "stop tokens"}


def asking(model: LanguageModel, chat: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """What ``results.json`` tells of how a model was asked, and the short form in its record.

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


def asked_differently(records: Sequence[Record]) -> list[str]:
    """A sentence for each respect in which the rows of a report were asked differently."""
    found = []
    for key, words in _WORDS.items():
        labels: dict[str, list[str]] = {}
        for record in records:
            labels.setdefault(record.asked.get(key, "not recorded"), []).append(record.label)
        if len(labels) > 1:
            shown = "; ".join(
                f"{', '.join(dict.fromkeys(names))}: {value or PLAIN}"
                for value, names in labels.items()
            )
            found.append(
                f"The rows were asked with different {words} ({shown}), which changes scores "
                "whatever was learnt; evaluate all of them with the same --template."
            )
    return found
