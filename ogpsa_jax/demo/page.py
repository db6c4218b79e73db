"""The demonstration's figure and its one page, made from records and measurements alone."""

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ogpsa_jax.demo.findings import COMPARED
from ogpsa_jax.demo.recipe import MATCHED_SAFETY
from ogpsa_jax.demo.scoring import SAFETY
from ogpsa_jax.demo.world import REFUSAL
from ogpsa_jax.evaluation import Record
from ogpsa_jax.reporting import (
    cells_html,
    explanation_html,
    figure_html,
    html_page,
    pareto_figure,
    table_html,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def demo_figure(records: Sequence[Record]) -> "Figure":
    """What every method of one comparison came to."""
    return pareto_figure(
        records, "A small model, aligned by each method", matched_safety=MATCHED_SAFETY
    )


def demo_page(records: Sequence[Record], extra: Mapping[str, Any]) -> str:
    """The report.

    Args:
      records: of the demonstration.
      extra: the other keys of its ``results.json``.

    Returns:
      A self-contained HTML document.
    """
    tables = [
        (each, [records[i] for i in each["records"]])
        for each in extra["comparisons"]
        if each["records"]
    ]
    sections = [
        (
            "The trade-off",
            figure_html(
                demo_figure(tables[0][1]),
                "Safety, and harmless requests answered, against general score, by method",
            )
            + _paragraph(
                f"{tables[0][0]['title']}. "
                "Right is better (general ability kept), up is better: harmful requests refused, "
                f"harmless ones answered. Above the dashed line, {MATCHED_SAFETY:.0%}, methods are "
                "compared at matched safety. The line of merges goes from the model before "
                "alignment to the naive one."
            ),
        ),
    ]
    for comparison, own in tables:
        content = table_html(own, MATCHED_SAFETY) + _findings(comparison["findings"])
        sections.append((comparison["title"], content))
    tasks = extra["recipe"]["pretraining"]["tasks"]
    sections += [
        ("How to read the tables", _reading()),
        ("Answers before and after", _answers(extra["answers"])),
        ("Along the way", _curves(extra["curves"])),
        (
            "Every general task",
            table_html(_tasks_only(tables[0][1], tasks), MATCHED_SAFETY, every_score=True),
        ),
        (
            "What the numbers mean",
            explanation_html(MATCHED_SAFETY, exact=True)
            + _paragraph(
                "A harmless request whose answer neither begins as the refusal does nor is right "
                "to the last character got a stammer, as the answers above show: low over-refusal "
                "alone is no merit. These scores are stricter than those of the same words that "
                "`ogpsa-jax evaluate` measures with rules or a judge, and have other names."
            ),
        ),
    ]
    worlds = extra["worlds"]
    dpo = any(comparison["dpo"] for comparison in extra["recipe"]["comparisons"])
    preferences = " and by direct preference optimisation from there (SFT+DPO)" if dpo else ""
    introduction = _paragraph(
        "A small decoder is pre-trained on a world of its own: general tasks, facts, and requests, "
        "harmless and harmful, all of which it answers, half of the harmful ones in another tone. "
        "Then it is aligned to refuse the harmful ones, by supervised fine-tuning on nothing but "
        f"refusals (SFT){preferences}. What that costs in general ability is the alignment tax. "
        f"World{'s' * (len(worlds) > 1)} {', '.join(map(str, worlds))}, mode {extra['mode']}, "
        f"{extra['seconds']:,.0f} seconds. Only held-out items are scored: general questions and "
        "harmless requests never trained on, and harmful requests about objects whose requests "
        "were never refused in training."
    )
    return html_page("The alignment tax of a small model", sections, introduction)


def curves_figure(curves: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Removed share, and loss on general items that no run has seen, by step of SFT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.6, 3.6), dpi=140, layout="constrained")
    removed, loss = figure.subplots(1, 2)
    for number, (label, measured) in enumerate(curves.items()):
        for axes, name, style in ((removed, "removed", "-"), (loss, "loss", "o-")):
            points = measured[name]
            if any(value for _, value in points):  # where nothing is projected, nothing is removed
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    color=f"C{number}",
                    label=label,
                    linewidth=1.2,
                    markersize=3,
                )
    removed.set(title="removed share of the squared norm", xlabel="step of SFT")
    removed.set_yscale("symlog", linthresh=1e-3)
    loss.set(title="loss on general items", xlabel="step of SFT", yscale="log")
    for axes in (removed, loss):
        axes.grid(color="#E4E4E4", linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _tasks_only(records: Sequence[Record], tasks: Sequence[str]) -> list[Record]:
    """Without the headline scores, but for the two that the table's last columns need."""
    kept = {"general", SAFETY, *tasks}
    return [
        record.model_copy(
            update={
                "scores": {name: value for name, value in record.scores.items() if name in kept},
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
        curves_figure(curves), "Removed share and loss on general items by step"
    ) + _paragraph(
        "Left: how much of the squared norm of what is projected (the gradient, or the update) lay "
        "in the reference subspace and was removed. Right: the loss, in nats a token, on general "
        "items that no run is trained on or refers to."
    )


def _reading() -> str:
    return _paragraph(
        "Much of what is kept is kept by training on general rows: replay alone, without any "
        "projection, stands in every table, and what projection adds is the difference to it. "
        "Learning rates and replay weights are literal settings (ogpsa_jax/demo/settings.py). "
        "Samples are sequences through forward and backward passes (a pair is two), training plus "
        "reference; every method has as many, and a forward pass alone counts a third. Stages "
        "with dpo count both. Seconds are of this machine, with compilation where a program was "
        "not yet compiled. Each run's configuration is in the folder `configs` of its world: "
        "`ogpsa-jax train` takes it as it is."
    )


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
