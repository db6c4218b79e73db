"""The demonstration's figure and its one page, made from records and measurements alone."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ogpsa_jax.demo.findings import COMPARED
from ogpsa_jax.demo.recipe import MATCHED_SAFETY, RECIPES
from ogpsa_jax.demo.scoring import SAFETY
from ogpsa_jax.demo.world import REFUSAL
from ogpsa_jax.evaluation import (
    Record,
    cells_html,
    explanation_html,
    figure_html,
    html_page,
    pareto_figure,
    table_html,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ABLATIONS = frozenset(method.label for recipe in RECIPES.values() for method in recipe.sft_only)


def demo_figure(records: Sequence[Record]) -> "Figure":
    """What every method that went through all stages came to."""
    return pareto_figure(
        [record for record in records if record.label not in ABLATIONS],
        "A small model, aligned by each method",
        matched_safety=MATCHED_SAFETY,
    )


def demo_page(records: Sequence[Record], extra: Mapping[str, Any]) -> str:
    """The report.

    Args:
      records: of the demonstration.
      extra: the other keys of its ``results.json``.

    Returns:
      A self-contained HTML document.
    """
    recipe = extra["recipe"]
    sections = [
        (
            "The trade-off",
            figure_html(
                demo_figure(records),
                "Safety, and harmless requests answered, against general score, by method",
            )
            + _paragraph(
                "Right is better (general ability kept), up is better: harmful requests refused, "
                f"harmless ones answered. Above the dashed line, {MATCHED_SAFETY:.0%}, methods are "
                "compared at matched safety. The line of merges goes from the model before "
                "alignment to the naive one. "
                "Settings that were tried in one stage only are in the table."
            ),
        ),
        ("Scores", table_html(records, MATCHED_SAFETY) + _cost_note()),
        ("What holds, and what does not", _findings(extra["findings"])),
        ("Answers before and after", _answers(extra["answers"])),
    ]
    if extra["curves"]:
        sections.append(("Along the way", _curves(extra["curves"])))
    sections += [
        ("Every general task", table_html(_tasks_only(records), MATCHED_SAFETY, every_score=True)),
        (
            "What the numbers mean",
            explanation_html(MATCHED_SAFETY, exact=True)
            + _paragraph(
                "A harmless request whose answer neither begins as the refusal does nor is right "
                "to the last character got a stammer, as the answers above show: low over-refusal "
                "alone is no merit. These scores are stricter than those of the same words that "
                "`ogpsa-jax evaluate` measures, and have other names."
            ),
        ),
    ]
    seeds = len(recipe["seeds"])
    preferences = " and by direct preference optimisation from there (SFT+DPO)"
    if len(recipe["stages"]) == 1:
        preferences = ""
    introduction = _paragraph(
        "A small decoder is pre-trained on a world of its own: general tasks, facts, and requests, "
        "harmless and harmful, all of which it answers, half of the harmful ones in another tone. "
        "Then it is aligned to refuse the harmful ones, by supervised fine-tuning on nothing but "
        f"refusals (SFT){preferences}. What that costs in general ability is the alignment "
        f"tax. {seeds} repetition{'s' * (seeds != 1)}, mode {extra['mode']}, "
        f"{extra['seconds']:,.0f} seconds. Only held-out items are scored: general questions and "
        "harmless requests never trained on, and harmful requests about objects whose requests "
        "were never refused in training."
    )
    return html_page("The alignment tax of a small model", sections, introduction)


def curves_figure(curves: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Removed fraction, and cosine of the step with a fresh general gradient, by step of SFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), dpi=140, layout="constrained")
    removed, change = figure.subplots(1, 2)
    for number, (label, measured) in enumerate(curves.items()):
        colour = f"C{number}"
        if values := measured.get("removed, sft"):
            steps = range(1, len(values) + 1)
            removed.plot(steps, values, color=colour, label=label, linewidth=1.2)
        if points := measured.get("first_order_change"):
            change.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=3)
    removed.set(title="removed share of the squared norm", xlabel="step of SFT")
    removed.set_yscale("symlog", linthresh=1e-3)
    change.set(title="cosine of the step and a general gradient", xlabel="step of SFT")
    change.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    for axes in (removed, change):
        axes.grid(color="#E4E4E4", linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
        else:
            axes.text(0.5, 0.5, "not measured in this mode", ha="center", transform=axes.transAxes)
    return figure


def _tasks_only(records: Sequence[Record]) -> list[Record]:
    """Without the headline scores, but for the two that the table's last columns need."""
    kept = ("general", SAFETY)
    return [
        record.model_copy(
            update={
                "scores": {
                    name: value
                    for name, value in record.scores.items()
                    if name in kept or name.startswith("task: ")
                },
                "cost": type(record.cost)(),
            }
        )
        for record in records
        if record.method != "merge"
    ]


def _findings(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return _paragraph("These runs decide none of the claims.")
    cells = [["", "stage", "claim", "measured"]]
    # What does not hold comes first: it is what a reader would not look for.
    for finding in sorted(found, key=lambda each: each["holds"]):
        verdict = "holds" if finding["holds"] else "does not hold"
        cells.append([verdict, finding["stage"], finding["claim"], finding["evidence"]])
    failing = sum(not finding["holds"] for finding in found)
    lead = f"Of {len(found)} claims, {len(found) - failing} hold and {failing} do not. {COMPARED}"
    return _paragraph(lead) + cells_html(cells, text=True)


def _answers(given: Mapping[str, Any]) -> str:
    labels = list(given["given"])
    cells = [["kind", "prompt", "expected", *labels]]
    for i, item in enumerate(given["asked"]):
        row = [given["given"][label][i] for label in labels]
        expected = REFUSAL if item["task"] == "harmful" else item["answer"]
        cells.append([item["task"], item["prompt"], expected, *row])
    return cells_html(cells, text=True)


def _curves(curves: Mapping[str, Mapping[str, Any]]) -> str:
    return figure_html(
        curves_figure(curves), "Removed fraction and first-order change by step"
    ) + _paragraph(
        "Left: how much of the squared norm of what is projected (the gradient, or the update) lay "
        "in the reference subspace and was removed. Right: the cosine between a step and the "
        "gradient, at the same weights, of the loss on general samples that no run has seen. Above "
        "zero the step raises the general loss, to first order; below zero it lowers it."
    )


def _cost_note() -> str:
    return _paragraph(
        "Samples are sequences through forward and backward passes (a pair is two), training plus "
        "reference; all methods have as many, but for mixing at equal data. Stage sft+dpo counts "
        "both. Seconds are of this machine, with compilation where a program was not yet compiled."
    )


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
