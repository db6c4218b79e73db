"""What of a report's records cannot be compared as it stands."""

from collections.abc import Sequence

from ogpsa_jax.evaluation.asking import PLAIN
from ogpsa_jax.reporting.rows import HEADLINE
from ogpsa_jax.runs import ScoreRecord

_WORDS = {"template": "chat templates", "stop_tokens": "stop tokens"}


def asked_differently(records: Sequence[ScoreRecord]) -> list[str]:
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


def to_mind(records: Sequence[ScoreRecord]) -> list[str]:
    """Sentences on what of a report's records cannot be compared as it stands."""
    found = asked_differently(records)
    found += [f"{record.label}: {text}" for record in records for text in record.warnings]
    groups: dict[tuple[str, str, str], list[ScoreRecord]] = {}
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
