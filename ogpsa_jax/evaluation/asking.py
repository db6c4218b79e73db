"""How a model was asked, and what of a report's rows cannot be compared as it stands.

A score depends on the words around a question and on where an answer ends, as much as on the
weights: ``results.json`` keeps both, and a report says where they differ.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from ogpsa_jax.evaluation.language_model import LanguageModel
from ogpsa_jax.evaluation.records import Record
from ogpsa_jax.evaluation.tables import HEADLINE

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
                "whatever was learned; evaluate all of them with the same --template."
            )
    return found


def to_mind(records: Sequence[Record]) -> list[str]:
    """Sentences on what of a report's records cannot be compared as it stands."""
    found = asked_differently(records)
    found += [f"{record.label}: {text}" for record in records for text in record.warnings]
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.label, record.method, record.stage), []).append(record)
    for (label, _, stage), group in groups.items():
        for name in dict.fromkeys(name for record in group for name in record.scores):
            count = sum(name in record.scores for record in group)
            if count < len(group):
                found.append(
                    f"The score {name} of {label}, stage {stage}, is that of {count} of its "
                    f"{len(group)} seeds; evaluate the others with the same suite."
                )
    for record in records:
        for name in record.scores.keys() & set(HEADLINE):
            if not 0 <= record.scores[name] <= 1:
                found.append(
                    f"The score {name} of {record.label}, stage {record.stage}, is "
                    f"{record.scores[name]:g}, but scores are fractions between 0 and 1; fix its "
                    "results.json."
                )
    return found
