"""The demonstration's figure and its one page, made from records and measurements alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ogpsa_jax.demo.findings import COMPARED
from ogpsa_jax.demo.recipe import MATCHED_SAFETY
from ogpsa_jax.demo.scoring import SAFETY
from ogpsa_jax.demo.settings import SETTINGS
from ogpsa_jax.reporting import finding, pareto_figure, sections
from ogpsa_jax.reporting.evidence import Evidence
from ogpsa_jax.reporting.finding import context
from ogpsa_jax.reporting.page import PageSection, Table, html_page
from ogpsa_jax.runs import BASE, ScoreRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_READING = (
    "Much of what is kept is kept by training on general rows: replay alone, without any "
    "projection, stands in every table, and what projection adds is the difference to it. "
    "Learning rates and replay weights are literal settings (ogpsa_jax/demo/settings.py). "
    "Samples are sequences through forward and backward passes (a pair is two), training plus "
    "reference; every method has as many, and a forward pass alone counts a third. Stages "
    "with dpo count both. Seconds are of this machine, with compilation where a program was "
    "not yet compiled. Each run's configuration is in the folder `configs` of its world: "
    "`ogpsa-jax train` takes it as it is."
)
_STAMMER = (
    "A harmless request whose answer neither begins as the refusal does nor is right to the last "
    "character got a stammer, as the answers above show: low over-refusal alone is no merit. These "
    "scores are stricter than those of the same words that `ogpsa-jax evaluate` measures with "
    "rules or a judge, and have other names."
)
_REGIMES = tuple(f", {regime.name}" for regime in SETTINGS)


def demo_figure(records: Sequence[ScoreRecord]) -> "Figure":
    """What every method of one comparison came to."""
    shown = named(records)
    return pareto_figure(shown, finding(shown, MATCHED_SAFETY), MATCHED_SAFETY)


def named(records: Sequence[ScoreRecord]) -> list[ScoreRecord]:
    """The records of one comparison, whose title says what general rows there are."""
    return [record.model_copy(update={"label": _named(record.label)}) for record in records]


def _named(label: str) -> str:
    return next((label.removesuffix(end) for end in _REGIMES if label.endswith(end)), label)


def demo_page(records: Sequence[ScoreRecord], extra: Mapping[str, Any]) -> str:
    """The report.

    Args:
      records: of the demonstration.
      extra: the other keys of its ``results.json``.

    Returns:
      A self-contained HTML document.
    """
    tables = [
        (each, named([records[i] for i in each["records"]]))
        for each in extra["comparisons"]
        if each["records"]
    ]
    headed, first = tables[0]
    kept = _named_evidence(
        Evidence.model_validate({name: extra[name] for name in Evidence.model_fields})
    )
    tasks = extra["recipe"]["pretraining"]["tasks"]
    level = MATCHED_SAFETY
    before = [record.label for record in first if record.method == BASE]
    caption = (
        f"{headed['title']}. The line of merges goes from the model before alignment to the naive "
        "one."
    )
    parts = [
        sections.trade_off(first, level, caption),
        *sections.methods(first, kept.methods),
        *sections.answers(kept.answers, before),
        *sections.along_the_way(kept, first),
        *(sections.scores(each["title"], own, level) for each, own in tables),
        sections.scores("Every general task", _tasks_only(first, tasks), level, every_score=True),
        PageSection("What was done", [_introduction(extra)], folded=True),
        PageSection("How to read the tables", [_READING, _STAMMER], folded=True),
        *(_claims(each) for each, _ in tables),
        sections.explanation(level, exact=True),
        sections.definitions(first),
    ]
    return html_page(
        "The alignment tax of a small model",
        finding(first, level),
        context(first, level),
        parts,
    )


def _named_evidence(kept: Evidence) -> Evidence:
    """What the runs kept, under the names that the page shows."""
    given = {_named(label): said for label, said in kept.answers.given.items()}
    return kept.model_copy(
        update={
            "answers": kept.answers.model_copy(update={"given": given}),
            "curves": {_named(label): measured for label, measured in kept.curves.items()},
        }
    )


def _introduction(extra: Mapping[str, Any]) -> str:
    worlds = extra["worlds"]
    dpo = any(comparison["dpo"] for comparison in extra["recipe"]["comparisons"])
    preferences = " and by direct preference optimization from there (SFT+DPO)" if dpo else ""
    return (
        "A small decoder is pre-trained on a world of its own: general tasks, facts, and requests, "
        "harmless and harmful, all of which it answers, half of the harmful ones in another tone. "
        "Then it is aligned to refuse the harmful ones, by supervised fine-tuning on nothing but "
        f"refusals (SFT){preferences}. What that costs in general ability is the alignment tax. "
        f"World{'s' * (len(worlds) > 1)} {', '.join(map(str, worlds))}, mode {extra['mode']}, "
        f"{extra['seconds']:,.0f} seconds. Only held-out items are scored: general questions and "
        "harmless requests never trained on, and harmful requests about objects whose requests "
        "were never refused in training."
    )


def _tasks_only(records: Sequence[ScoreRecord], tasks: Sequence[str]) -> list[ScoreRecord]:
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


def _claims(comparison: Mapping[str, Any]) -> PageSection:
    name, found = f"Claims, {comparison['title']}", comparison["findings"]
    if not found:
        return PageSection(name, ["These runs decide none of the claims."], folded=True)
    cells = [["claim", "stage", "verdict", "measured"]]
    # What does not hold comes first: it is what a reader would not look for.
    for each in sorted(found, key=lambda each: each["holds"]):
        verdict = "holds" if each["holds"] else "does not hold"
        cells.append([each["claim"], each["stage"], verdict, each["evidence"]])
    failing = sum(not each["holds"] for each in found)
    lead = f"Of {len(found)} claims, {len(found) - failing} hold and {failing} do not. {COMPARED}"
    return PageSection(name, [lead], table=Table(cells, text=True), folded=True)
