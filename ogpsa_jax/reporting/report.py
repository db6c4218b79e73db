"""``ogpsa-jax report``: the safety–utility table and figure over any runs, as CSV, PNG and HTML."""

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.records import Record, check_definitions, read_records
from ogpsa_jax.files import make_folder, write_whole
from ogpsa_jax.reporting.comparability import to_mind
from ogpsa_jax.reporting.figure import pareto_figure
from ogpsa_jax.reporting.page import figure_html, html_page, table_html
from ogpsa_jax.reporting.rows import SAFETY_TOLERANCE, safety_score
from ogpsa_jax.reporting.tables import csv_table, heading, markdown_table


def report(
    runs: Sequence[str | Path],
    output_dir: str | Path = "report",
    matched_safety: float | None = None,
) -> list[Record]:
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
    if not runs:
        raise InputError("report: name at least one run directory or results.json.")
    if matched_safety is not None and not 0 <= matched_safety <= 1:
        raise InputError(f"report: matched safety must be between 0 and 1, not {matched_safety}.")
    records = [record for run in runs for record in read_records(run)]
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
    output = Path(output_dir)
    make_folder(output)
    figure = pareto_figure(records)
    figure.savefig(output / "pareto.png")
    write_whole(output / "report.csv", csv_table(records, matched_safety))
    notes = to_mind(records)
    table = markdown_table(records, matched_safety)
    write_whole(output / "report.md", "\n\n".join([table, *notes]) + "\n")
    told = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    page = html_page(
        "Safety and utility",
        [
            ("The trade-off", figure_html(figure, "Safety score against general score")),
            ("Scores", told + table_html(records, matched_safety, every_score=True)),
            ("What the numbers mean", explanation_html(matched_safety)),
            ("How they were measured", definitions_html(records)),
        ],
    )
    write_whole(output / "report.html", page)
    return records


def definitions_html(records: Sequence[Record]) -> str:
    """How each score was measured, as the records say; equal definitions are one entry."""
    told = {name: text for record in records for name, text in record.definitions.items()}
    if not told:
        return "<p>The results do not say.</p>"
    entries = (
        f"<dt>{html.escape(heading(name))}</dt><dd>{html.escape(text)}</dd>"
        for name, text in told.items()
    )
    return f"<dl>{''.join(entries)}</dl>"


def explanation_html(matched_safety: float | None = None, exact: bool = False) -> str:
    """What the columns of the table mean.

    Args:
      matched_safety: as in the table.
      exact: the columns are those of the demonstration, which scores by exact match.
    """
    safety = (
        "<dt>exact safety</dt><dd>Share of harmful requests answered with the refusal, to the last "
        "character.</dd>"
        "<dt>prefix over refusal</dt><dd>Share of harmless requests whose answer begins as the "
        "refusal does, whatever follows; lower is better.</dd>"
        "<dt>exact benign compliance</dt><dd>Share of harmless requests answered rightly, to the "
        "last character.</dd>"
        if exact
        else "<dt>safety</dt><dd>Share of harmful requests that are refused.</dd>"
        "<dt>over refusal</dt><dd>Share of harmless requests that are refused; lower is better."
        "</dd>"
        "<dt>benign compliance</dt><dd>Share of harmless requests that are answered.</dd>"
    )
    level = (
        f"is at least that of the naive run of the same stage less {SAFETY_TOLERANCE}"
        if matched_safety is None
        else f"is at least {matched_safety}"
    )
    return (
        "<dl>"
        "<dt>general</dt><dd>Mean score on tasks that have nothing to do with safety: the ability "
        "that alignment is to leave alone.</dd>"
        f"{safety}"
        "<dt>tax removed</dt><dd>(general of the method − general of naive) / (general before "
        "alignment − general of naive): 0 % is naive, 100 % loses nothing. Given only where the "
        f"safety score {level}, for a model that refuses less keeps its abilities without any "
        "method.</dd>"
        "</dl>"
    )
