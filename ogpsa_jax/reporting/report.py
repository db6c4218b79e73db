"""``ogpsa-jax report``: the safety–utility table and figure over any runs, as CSV, PNG and HTML."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import make_folder, write_whole
from ogpsa_jax.reporting import sections
from ogpsa_jax.reporting.comparability import to_mind
from ogpsa_jax.reporting.evidence import Evidence, read_evidence
from ogpsa_jax.reporting.figure import pareto_figure
from ogpsa_jax.reporting.finding import context, finding
from ogpsa_jax.reporting.page import html_page
from ogpsa_jax.reporting.rows import safety_score
from ogpsa_jax.reporting.tables import csv_table, markdown_table
from ogpsa_jax.runs import BASE, ScoreRecord, check_definitions, read_scores


def report(
    runs: Sequence[str | Path],
    output_dir: str | Path = "report",
    matched_safety: float | None = None,
) -> list[ScoreRecord]:
    """Write ``report.csv``, ``report.md``, ``report.html`` and ``pareto.png`` of some runs.

    Args:
      runs: run directories or results files.
      output_dir: where they go; it is made if need be.
      matched_safety: the safety score from which on the share of the tax removed is given; by
        default that of the naive run of the same stage, less a small tolerance.

    Returns:
      The records of all runs, in order; ``text_table`` shows them.

    Raises:
      InputError: no run, a run without results, or none with both a general and a safety score.
    """
    records = _read(runs, matched_safety)
    output = Path(output_dir)
    make_folder(output)
    notes = to_mind(records)
    sentence = finding(records, matched_safety)
    pareto_figure(records, sentence, matched_safety).savefig(output / "pareto.png")
    write_whole(output / "report.csv", csv_table(records, matched_safety))
    against, table = context(records, matched_safety), markdown_table(records, matched_safety)
    write_whole(output / "report.md", "\n\n".join([sentence, against, table, *notes]) + "\n")
    page = _page(records, notes, read_evidence(runs, records), matched_safety)
    write_whole(output / "report.html", page)
    return records


def _read(runs: Sequence[str | Path], matched_safety: float | None) -> list[ScoreRecord]:
    """The records of all runs, if a report can be made of them."""
    if not runs:
        raise InputError("report: name at least one run directory or results.json.")
    if matched_safety is not None and not 0 <= matched_safety <= 1:
        raise InputError(f"report: matched safety must be between 0 and 1, not {matched_safety}.")
    records = [record for run in runs for record in read_scores(run)]
    counted = Counter((r.label, r.method, r.stage, r.seed) for r in records)
    for (label, _, stage, seed), count in counted.items():
        if count > 1:
            raise InputError(
                f"report: {count} of the results are of {label!r}, stage {stage}, seed {seed}; "
                "name each run once, and evaluate different ones under different --label."
            )
    check_definitions(records)
    if not any("general" in r.scores and safety_score(r.scores) for r in records):
        known = sorted({name for record in records for name in record.scores})
        raise InputError(
            "report: no run has both a general and a safety score (found: "
            f"{', '.join(known) or 'none'}); evaluate the runs with a suite that measures both."
        )
    return records


def _page(
    records: Sequence[ScoreRecord],
    notes: Sequence[str],
    kept: Evidence,
    matched_safety: float | None,
) -> str:
    before = [record.label for record in records if record.method == BASE]
    return html_page(
        "Safety and utility",
        finding(records, matched_safety),
        context(records, matched_safety),
        [
            sections.trade_off(records, matched_safety),
            *sections.methods(records, kept.methods),
            *sections.answers(kept.answers, before),
            *sections.along_the_way(kept, records),
            sections.scores("Scores", records, matched_safety, notes, every_score=True),
            sections.explanation(matched_safety),
            sections.definitions(records),
        ],
    )
