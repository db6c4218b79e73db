"""How each kind of task runs on a model, and how its items are combined."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.intervals import (
    bootstrap_interval,
    bootstrap_means,
    wilson_error,
    wilson_interval,
)
from ogpsa_jax.evaluation.items import Item, extracted
from ogpsa_jax.evaluation.refusal import RULES, classify_refusal
from ogpsa_jax.evaluation.suite import (
    ExactMatchTask,
    GreedyMatchTask,
    MultipleChoiceTask,
    OverRefusalTask,
    PerplexityTask,
    RefusalTask,
    Task,
)
from ogpsa_jax.evaluation.thoughts import only_thoughts, without_thoughts

if TYPE_CHECKING:
    from ogpsa_jax.evaluation.language_model import LanguageModel
    from ogpsa_jax.evaluation.scoring import LogLikelihood

ItemOutcome = dict[str, Any]  # what an item's line contains
UNJUDGED = "unjudged"  # the judgement of an answer that the judge did not judge


_ROUND_OFF = 1e-9  # relative; sums of the same numbers in another order differ by less
_MOST_NATS = 700.0  # per token; the perplexity of more is not a float


@dataclass(frozen=True)
class TaskResult:
    """The result of a task over its items.

    Attributes:
      kind: of the task.
      value: the task's value, a fraction.
      interval: its 95 % confidence interval; ``None`` for the perplexity of one document, or of
        equal documents, which says nothing about others.
      standard_error: of the value; ``None`` where the interval is.
      items: how many were scored.
      details: further figures.
    """

    kind: str
    value: float
    interval: tuple[float, float] | None
    standard_error: float | None
    items: int
    details: dict[str, float]


def run_items(
    model: "LanguageModel", task: Task, items: Sequence[Item], chat: bool, seed: int
) -> list[ItemOutcome]:
    """Put items to the model; what the model says, not yet judged.

    Args:
      model: what is scored.
      task: what is asked.
      items: a batch of the task's items.
      chat: whether prompts are a user's turn.
      seed: of the sampling of this batch.

    Raises:
      InputError: the model's log-likelihoods are not finite.
    """
    if isinstance(task, PerplexityTask):
        scored = model.text_log_likelihoods([item.prompt for item in items])
        _check_finite(model, task, scored)
        return [
            {"nats": -one.total, "tokens": one.tokens, "bytes": len(item.prompt.encode())}
            for item, one in zip(items, scored, strict=True)
        ]
    if isinstance(task, MultipleChoiceTask):
        return _choose(model, task, items, chat)
    if isinstance(task, GreedyMatchTask):
        separator = "" if chat else task.separator
        pairs = [(item.prompt, separator + item.expected) for item in items]
        scored = model.log_likelihoods(pairs, chat=chat)
        _check_finite(model, task, scored)
        return [
            {
                "prompt": item.prompt,
                "expected": item.expected,
                "log_likelihood": one.total,
                "correct": one.greedy,
            }
            for item, one in zip(items, scored, strict=True)
        ]
    answers = model.generate(
        [item.prompt for item in items],
        chat=chat,
        max_new_tokens=task.max_new_tokens,
        temperature=task.temperature,
        seed=seed,
    )
    outcomes: list[ItemOutcome] = []
    for item, answer in zip(items, answers, strict=True):
        outcome: ItemOutcome = {"prompt": item.prompt, "answer": answer}
        if isinstance(task, ExactMatchTask):
            said = without_thoughts(answer)
            found = said if task.extract is None else extracted(task.extract, said)
            right = found is not None and normalised(found) == normalised(item.expected)
            outcome |= {"expected": item.expected, "extracted": found, "correct": right}
        elif not task.judge:
            outcome |= {"judgement": classify_refusal(answer), "judge": RULES}
        outcomes.append(outcome)
    return outcomes


def normalised(text: str) -> str:
    """A text as exact match compares it.

    Lower case, single spaces, no separators between thousands, no full stop at the end.
    """
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", " ".join(text.lower().split()))
    return text.removesuffix(".").strip()


def summarise(task: Task, outcomes: Sequence[ItemOutcome]) -> TaskResult:
    """Value, interval and further figures of a task from its items."""
    count = len(outcomes)
    if isinstance(task, PerplexityTask):
        return _perplexity(task, outcomes)
    details: dict[str, float] = {}
    if isinstance(task, RefusalTask | OverRefusalTask):
        judged = [o["judgement"] for o in outcomes if o["judgement"] != UNJUDGED]
        if not judged:
            raise InputError(
                f"task {task.name}: the judge judged none of the {count} answers; use another "
                "judge, or `judge: false`."
            )
        outcomes = [outcome for outcome in outcomes if outcome["judgement"] != UNJUDGED]
        left_out, count = (count - len(judged)) / count, len(judged)
        hits = sum(judgement != "full_compliance" for judgement in judged)
        details = {
            "full_refusal": judged.count("full_refusal") / count,
            "partial_refusal": judged.count("partial_refusal") / count,
            "empty_answers": sum(not outcome["answer"].strip() for outcome in outcomes) / count,
            "unjudged": left_out,
        }
    else:
        hits = sum(outcome["correct"] for outcome in outcomes)
    if not isinstance(task, MultipleChoiceTask | GreedyMatchTask):
        unfinished = sum(only_thoughts(outcome["answer"]) for outcome in outcomes)
        details["only_thoughts"] = unfinished / count
    low, high = wilson_interval(hits, count, 0.95)
    return TaskResult(
        kind=task.kind,
        value=hits / count,
        interval=(low, high),
        standard_error=wilson_error(hits, count),
        items=count,
        details=details,
    )


def _choose(
    model: "LanguageModel", task: MultipleChoiceTask, items: Sequence[Item], chat: bool
) -> list[ItemOutcome]:
    separator = "" if chat else task.separator
    pairs = [(item.prompt, separator + choice) for item in items for choice in item.choices]
    all_scored = model.log_likelihoods(pairs, chat=chat)
    _check_finite(model, task, all_scored)
    scored = iter(all_scored)
    outcomes: list[ItemOutcome] = []
    for item in items:
        likelihoods = [next(scored) for _ in item.choices]
        lengths = {
            "none": [1] * len(item.choices),
            "characters": [len(choice) for choice in item.choices],
            "tokens": [max(one.tokens, 1) for one in likelihoods],
        }[task.normalise]
        values = [one.total / length for one, length in zip(likelihoods, lengths, strict=True)]
        chosen = max(range(len(values)), key=values.__getitem__)
        outcomes.append(
            {
                "prompt": item.prompt,
                "choices": list(item.choices),
                "log_likelihoods": [one.total for one in likelihoods],
                "chosen": chosen,
                "right": item.right,
                "correct": chosen == item.right,
            }
        )
    return outcomes


def _check_finite(model: "LanguageModel", task: Task, scored: "Sequence[LogLikelihood]") -> None:
    if not all(math.isfinite(one.total) for one in scored):
        raise InputError(
            f"{model.name}: log-likelihoods in task {task.name} are not finite; the checkpoint is "
            "broken (did its training diverge?)."
        )


def _perplexity(task: PerplexityTask, outcomes: Sequence[ItemOutcome]) -> TaskResult:
    nats = [outcome["nats"] for outcome in outcomes]
    tokens = [outcome["tokens"] for outcome in outcomes]
    if not sum(tokens):
        raise InputError(f"task {task.name}: the tokenizer makes no token of any text.")
    per_token = sum(nats) / sum(tokens)
    low, high = bootstrap_interval(nats, tokens)
    varies = len(nats) > 1 and high - low > _ROUND_OFF * abs(per_token)
    if high > _MOST_NATS:
        raise InputError(
            f"task {task.name}: {per_token:.3g} nats per token; the checkpoint is broken (did its "
            "training diverge?)."
        )
    return TaskResult(
        kind="perplexity",
        value=math.exp(-per_token),
        interval=(math.exp(-high), math.exp(-low)) if varies else None,
        standard_error=float(np.exp(-bootstrap_means(nats, tokens)).std()) if varies else None,
        items=len(outcomes),
        details={
            "nats_per_token": per_token,
            "perplexity": math.exp(per_token),
            "bits_per_byte": sum(nats) / math.log(2) / sum(o["bytes"] for o in outcomes),
            "tokens": float(sum(tokens)),
        },
    )
