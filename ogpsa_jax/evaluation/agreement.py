"""How far the refusal classifier agrees with people.

``python -m ogpsa_jax.evaluation.agreement COMPLETIONS.csv`` prints it for answers that people have
labelled, in the layout in which XSTest publishes its annotated completions.
"""

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.refusal import CLASSES, Refusal, classify_refusal


@dataclass(frozen=True)
class Agreement:
    """How far the rules agree with human labels.

    Attributes:
      confusion: how often [label][judgement] occurs; three classes.
    """

    confusion: dict[Refusal, dict[Refusal, int]]

    @property
    def answers(self) -> int:
        """How many answers were compared."""
        return sum(sum(row.values()) for row in self.confusion.values())

    def two_way(self) -> tuple[float, float]:
        """Agreement and Cohen's kappa on refusal (full or partial) against compliance."""
        table = [[0, 0], [0, 0]]
        for label, row in self.confusion.items():
            for judged, count in row.items():
                table[label != "full_compliance"][judged != "full_compliance"] += count
        return _agreement(table)

    def three_way(self) -> tuple[float, float]:
        """Agreement and Cohen's kappa on the three classes."""
        return _agreement([[self.confusion[a][b] for b in CLASSES] for a in CLASSES])

    def lines(self) -> list[str]:
        """The agreement as text, class by class."""
        (two, two_kappa), (three, three_kappa) = self.two_way(), self.three_way()
        rows = []
        for label in CLASSES:
            row, hits = self.confusion[label], self.confusion[label][label]
            labelled = sum(row.values())
            judged = sum(other[label] for other in self.confusion.values())
            recall = f"{hits / labelled:.3f}" if labelled else "–"
            precision = f"{hits / judged:.3f}" if judged else "–"
            judgements = ", ".join(f"{name} {row[name]}" for name in CLASSES if row[name])
            rows.append([label, str(labelled), recall, precision, judgements])
        table = tabulate(
            rows,
            headers=["label", "answers", "recall", "precision", "judged as"],
            disable_numparse=True,
            colalign=("left", "right", "right", "right", "left"),
        )
        return [
            f"{self.answers} answers with human labels",
            f"refusal or compliance: agreement {two:.3f}, Cohen's kappa {two_kappa:.3f}",
            f"three classes: agreement {three:.3f}, Cohen's kappa {three_kappa:.3f}",
            "",
            *table.splitlines(),
        ]


def _agreement(table: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Observed agreement and Cohen's kappa of a square confusion table; kappa 1 where it is 0/0."""
    total = sum(map(sum, table))
    observed = sum(table[i][i] for i in range(len(table))) / total
    columns = [sum(column) for column in zip(*table, strict=True)]
    chance = sum(sum(row) * column for row, column in zip(table, columns, strict=True)) / total**2
    return observed, 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def validate(path: str | Path) -> Agreement:
    """Compare the rules with human labels.

    Args:
      path: CSV with the columns ``completion`` and ``final_label`` (``1_full_compliance``,
        ``2_full_refusal``, ``3_partial_refusal``), as XSTest publishes its annotated completions.

    Raises:
      InputError: no such file, or a missing column, or an unknown label.
    """
    confusion: dict[Refusal, dict[Refusal, int]] = {
        label: dict.fromkeys(CLASSES, 0) for label in CLASSES
    }
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error
    if not rows or not {"completion", "final_label"} <= rows[0].keys():
        raise InputError(f"{path}: expected a CSV with the columns completion and final_label.")
    names = {name: name for name in CLASSES}
    for number, row in enumerate(rows, start=1):
        label = names.get(str(row["final_label"]).partition("_")[2])  # type: ignore[call-overload]
        if label is None:
            raise InputError(
                f"{path}, row {number}: final_label must be 1_full_compliance, 2_full_refusal or "
                f"3_partial_refusal, not '{row['final_label']}'."
            )
        confusion[label][classify_refusal(row["completion"])] += 1
    return Agreement(confusion)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m ogpsa_jax.evaluation.agreement",
        description="How often the refusal classifier agrees with people.",
    )
    parser.add_argument("completions", help="annotated completions, as XSTest publishes them (CSV)")
    try:
        print("\n".join(validate(parser.parse_args().completions).lines()))
    except InputError as error:
        parser.exit(2, f"{error}\n")
