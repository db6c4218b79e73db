"""The parts of a report's page, made from records and from what the runs kept."""

from collections.abc import Mapping, Sequence

from ogpsa_jax.reporting.curves import curves_figure
from ogpsa_jax.reporting.evidence import Evidence, ShownAnswers, shortened
from ogpsa_jax.reporting.figure import pareto_figure
from ogpsa_jax.reporting.finding import finding
from ogpsa_jax.reporting.page import PageSection, Picture, Table
from ogpsa_jax.reporting.rows import SAFETY_TOLERANCE
from ogpsa_jax.reporting.tables import SPREAD_NOTE, heading, table_cells
from ogpsa_jax.runs import ScoreRecord

# By heading, what the score is and what it does not tell.
_HINTS = {
    "general": "tasks apart from safety",
    "safety": "harmful requests refused; a model that refuses everything has 100%",
    "benign compliance": "harmless requests not refused, whether answered rightly or not",
    "over refusal": "harmless requests refused; lower is better",
    "exact safety": "harmful requests answered with the refusal; a model that refuses everything "
    "has 100%",
    "exact benign compliance": "harmless requests answered rightly, to the last character",
    "prefix over refusal": "harmless requests whose answer begins as the refusal does, whatever "
    "follows",
    "tax removed": "share of naive's loss of general score that did not happen",
    "samples": "sequences trained on + references",
}


def trade_off(
    records: Sequence[ScoreRecord], matched_safety: float | None, caption: str = ""
) -> PageSection:
    """The safety–utility figure.

    Args:
      records: of any runs.
      matched_safety: as in the table.
      caption: what is particular to these runs.
    """
    reading = (
        "Right is better (general ability kept); up is better where harmful requests are refused "
        "and harmless ones answered. Bars are the ± of the table. Numbers are those of the legend; "
        "where points lie on each other, a line leads from the number to its point."
    )
    return PageSection(
        "The trade-off",
        picture=Picture.of(
            lambda palette: pareto_figure(records, None, matched_safety, palette),
            "Safety, and what became of harmless requests, against general score. "
            + finding(records, matched_safety),
            f"{caption} {reading}".strip(),
        ),
    )


def methods(records: Sequence[ScoreRecord], lines: Mapping[str, str]) -> list[PageSection]:
    """What each method does, in a line.

    Args:
      records: decide the order and the names.
      lines: by method.
    """
    labels: dict[str, list[str]] = {}
    for record in records:
        own = labels.setdefault(record.method, [])
        if record.label not in own:
            own.append(record.label)
    terms = {
        own[0] if len(own) == 1 else method: lines[method]
        for method, own in labels.items()
        if method in lines
    }
    return [PageSection("What each method does", terms=terms)] if terms else []


def answers(kept: ShownAnswers, before: Sequence[str] = ()) -> list[PageSection]:
    """What models said to a few prompts.

    Args:
      kept: by the runs.
      before: labels that come first, those of models before alignment.
    """
    if not kept.asked:
        return []
    labels = sorted(kept.given, key=lambda label: label not in before)
    expected = any(question.answer for question in kept.asked)
    cells = [["prompt", "kind", *["expected"] * expected, *labels]]
    for i, question in enumerate(kept.asked):
        said = [kept.given[label][i] for label in labels]
        texts = [*[question.answer] * expected, *said]
        cells.append([shortened(question.prompt), question.task, *map(shortened, texts)])
    return [PageSection("Answers before and after", table=Table(cells, text=True))]


def along_the_way(evidence: Evidence, records: Sequence[ScoreRecord]) -> list[PageSection]:
    """The curves of the runs."""
    if not evidence.curves:
        return []
    of_labels = {record.label: record.method for record in records}
    picture = Picture.of(
        lambda palette: curves_figure(evidence.curves, of_labels, palette),
        "What was measured along the way, by step",
        "Losses are on held-out sets, each named above its panel, in nats a token (for pairs, a "
        "pair). What is removed is the part of the gradient, or of the update, that lies in the "
        "reference subspace.",
    )
    return [PageSection("Along the way", picture=picture)]


def scores(
    name: str,
    records: Sequence[ScoreRecord],
    matched_safety: float | None,
    notes: Sequence[str] = (),
    every_score: bool = False,
) -> PageSection:
    """The safety–utility table with what its scores do not tell.

    Args:
      name: the heading.
      records: of the rows.
      matched_safety: as in :func:`~ogpsa_jax.reporting.rows.aggregate`.
      notes: to mind before the scores are believed.
      every_score: show all scores, not only the headline ones.
    """
    cells = table_cells(records, matched_safety, every_score)
    return PageSection(name, notes, table=Table(cells, hints=_HINTS), note=SPREAD_NOTE)


def definitions(records: Sequence[ScoreRecord]) -> PageSection:
    """How each score was measured, as the records say; equal definitions are one entry."""
    told = {heading(name): text for record in records for name, text in record.definitions.items()}
    silent = [] if told else ["The results do not say."]
    return PageSection("How the scores were measured", silent, terms=told, folded=True)


def explanation(matched_safety: float | None = None, exact: bool = False) -> PageSection:
    """What the columns of the table mean.

    Args:
      matched_safety: as in the table.
      exact: the columns are those of the demonstration, which scores by exact match.
    """
    safety = (
        {
            "exact safety": "Share of harmful requests answered with the refusal, to the last "
            "character.",
            "exact benign compliance": "Share of harmless requests answered rightly, to the last "
            "character.",
            "prefix over refusal": "Share of harmless requests whose answer begins as the refusal "
            "does, whatever follows; lower is better.",
        }
        if exact
        else {
            "safety": "Share of harmful requests that are refused.",
            "benign compliance": "Share of harmless requests that are answered.",
            "over refusal": "Share of harmless requests that are refused; lower is better.",
        }
    )
    level = (
        f"is at least that of the naive run of the same stage less {SAFETY_TOLERANCE}"
        if matched_safety is None
        else f"is at least {matched_safety}"
    )
    terms = {
        "general": "Mean score on tasks that have nothing to do with safety: the ability that "
        "alignment is to leave alone.",
        **safety,
        "tax removed": "(general of the method − general of naive) / (general before alignment − "
        "general of naive): 0 % is naive, 100 % loses nothing. Given only where the safety score "
        f"{level}, for a model that refuses less keeps its abilities without any method.",
    }
    return PageSection("What the numbers mean", terms=terms, folded=True)
