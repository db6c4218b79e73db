"""The content of ``results.json``: scores, how each was measured, and warnings."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from ogpsa_jax.evaluation.asking import asking
from ogpsa_jax.evaluation.items import Item
from ogpsa_jax.evaluation.language_model import LanguageModel
from ogpsa_jax.evaluation.refusal import RULES
from ogpsa_jax.evaluation.suite import OverRefusalTask, RefusalTask, Suite, Task
from ogpsa_jax.evaluation.tasks import TaskResult
from ogpsa_jax.runs import Provenance, ScoreRecord

# What the model's answers do not depend on. Their lines name the judge.
NOT_ASKED = {"name", "path", "limit", "where", "score", "seed", "judge"}
_EMPTY = 0.05  # share of empty answers above which a warning says how they count
# Scores over several tasks; a task of such a name has no score of its own.
_OWN = {"general", "safety", "over_refusal", "benign_compliance"}
# Counts up when other parts of what a model writes are kept or matched.
ANSWERS = "answers 2"


def summary(
    model: LanguageModel,
    suite: Suite,
    items: Mapping[str, Sequence[Item]],
    results: dict[str, TaskResult],
    named: Provenance,
    judge: str | None,
    chat: bool,
) -> tuple[dict[str, Any], ScoreRecord]:
    """The keys of ``results.json`` but its records, and its record.

    Args:
      model: what was scored.
      suite: the tasks.
      items: of each task, by its name.
      results: of each task, by its name.
      named: how the report names the model.
      judge: the name of the judge, where there is one.
      chat: whether any task was put as a user's turn.
    """
    asked, asked_shortly = asking(model, chat)
    scores, errors = _scores(suite, results)
    content = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "suite": suite.name,
        "asked": asked,
        "tasks": {name: result.__dict__ for name, result in results.items()},
        "scores": dict(scores),
        "confidence": 0.95,
        "label": named.label,
        "warnings": [text for name, result in results.items() for text in _warnings(name, result)],
    }
    measured = {task.name: _definition(task, items[task.name], judge) for task in suite.tasks}
    definitions = {
        name: "; ".join(measured[task.name] for task in suite.tasks if task.score == counted)
        for name in scores
        for counted in ("over_refusal" if name == "benign_compliance" else name,)
    }
    for name, result in results.items():
        if name not in _OWN:
            scores[name], definitions[name] = result.value, measured[name]
            if result.standard_error is not None:
                errors[name] = result.standard_error
    record = ScoreRecord(
        label=named.label,
        method=named.method,
        stage=named.stage,
        seed=named.seed,
        scores=scores,
        spread=errors,
        definitions=definitions,
        asked=asked_shortly,
        warnings=content["warnings"],
        cost=named.cost,
    )
    return content, record


def results_text(results: dict[str, Any]) -> str:
    """Results for a terminal: a line per task, then the scores, then what to mind."""
    rows = []
    for name, task in results["tasks"].items():
        shown = f"{task['value']:.3f}"
        if task["interval"] is not None:
            low, high = task["interval"]
            shown += f" [{low:.3f}, {high:.3f}]"
        if task["kind"] == "perplexity":
            shown += f" = 1 / perplexity ({task['details']['perplexity']:.3f})"
        kind, count = task["kind"].replace("_", " "), task["items"]
        rows.append([f"  {name}", shown, f"{kind}, {count} item{'s' * (count != 1)}"])
    rows += [[name, f"{value:.3f}", ""] for name, value in results["scores"].items()]
    table = tabulate(rows, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)
    return "\n".join(
        [
            f"{results['model']}, suite {results['suite']}",
            *(line.rstrip() for line in table.splitlines()),
            *(f"warning: {text}" for text in results["warnings"]),
        ]
    )


def _scores(
    suite: Suite, results: dict[str, TaskResult]
) -> tuple[dict[str, float], dict[str, float]]:
    """The mean of the tasks that count towards each score, and its standard error."""
    scores, errors = {}, {}
    for name in ("general", "safety", "over_refusal"):
        own = [results[task.name] for task in suite.tasks if task.score == name]
        if own:
            scores[name] = sum(result.value for result in own) / len(own)
            parts = [result.standard_error for result in own]
            if None not in parts:
                errors[name] = math.hypot(*(part or 0.0 for part in parts)) / len(own)
    if "over_refusal" in scores:
        scores["benign_compliance"] = 1 - scores["over_refusal"]
        if "over_refusal" in errors:
            errors["benign_compliance"] = errors["over_refusal"]
    return scores, errors


def _definition(task: Task, items: Sequence[Item], judge: str | None) -> str:
    """How a task's value is measured, in words, with a hash of its settings and items."""
    settings = task.model_dump(exclude=NOT_ASKED)
    content = json.dumps([ANSWERS, settings, [item.__dict__ for item in items]], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    told = f"{task.kind} of {len(items)} items {digest}"
    if isinstance(task, RefusalTask | OverRefusalTask):
        told += f" by {judge if task.judge else RULES}"
    return told


def _warnings(name: str, result: TaskResult) -> list[str]:
    """Warnings about the value of a task."""
    texts = []
    unjudged, thoughts = (result.details.get(key, 0.0) for key in ("unjudged", "only_thoughts"))
    if unjudged:
        asked = round(result.items / (1 - unjudged))
        texts.append(
            f"task {name}: {asked - result.items} of {asked} answers are unjudged, as the judge's "
            "content filter refused them or no reply counted; they are left out of the score. The "
            "same command asks again."
        )
    empty = result.details.get("empty_answers", 0.0)
    if empty > _EMPTY:
        texts.append(
            f"task {name}: {empty:.0%} of the answers are empty and count as full compliance; the "
            "score does not measure them: read items.jsonl, and check the chat template."
        )
    if thoughts:
        texts.append(
            f"task {name}: {thoughts:.0%} of the answers end within the model's thoughts and count "
            "as empty; raise the task's max_new_tokens."
        )
    return texts
