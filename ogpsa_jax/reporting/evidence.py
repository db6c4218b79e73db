"""What a report shows beside scores, where the runs kept it: answers, curves, words on methods.

The demonstration keeps all three in its ``results.json``. Of a run, the answers are those of its
evaluations (``items.jsonl``) and the curves those of its ``metrics.jsonl``.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json
from ogpsa_jax.runs import BASE, NAIVE, ScoreRecord, read_scores

REMOVED = "share of the squared norm removed"
_PROMPTS = 2  # of each task
_LETTERS = 280  # of a prompt or an answer
METHOD_LINES = {
    BASE: "the model before safety fine-tuning",
    NAIVE: "safety data alone: it pays the whole alignment tax",
    "mixing": "general rows are mixed into the safety data",
    "merge": "weights between the model before alignment and the naive one",
    "lora": "only adapters of low rank are trained",
    "replay alone": "general rows are trained on beside the safety data; nothing is projected",
    "a-gem": "gradients lose what points against the reference gradients, and only that",
    "ogpsa-paper": "gradients are projected off the reference subspace, momentum left alone",
    "ogpsa-in-step": "gradients are projected off those of the reference rows in every batch",
    "ogpsa-recommended": "gradients and updates are projected off the inputs that general rows "
    "make in each layer",
}


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(_Kept):
    """A prompt that several models answered."""

    task: str
    prompt: str
    answer: str = ""


class ShownAnswers(_Kept):
    """What models said to a few prompts: ``given[label][i]`` to ``asked[i]``."""

    asked: list[Question] = []
    given: dict[str, list[str]] = {}


class Evidence(_Kept):
    """What a report shows beside the scores.

    Attributes:
      methods: by a record's method, what it does, in a line.
      answers: to a few prompts.
      curves: by label and measure, (step, value).
    """

    methods: dict[str, str] = {}
    answers: ShownAnswers = ShownAnswers()
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}


def read_evidence(runs: Sequence[str | Path], records: Sequence[ScoreRecord]) -> Evidence:
    """What the runs of a report kept.

    Args:
      runs: run directories or results files.
      records: of all of them.

    Raises:
      InputError: a file is not as it must be.
    """
    methods = {r.method: METHOD_LINES[r.method] for r in records if r.method in METHOD_LINES}
    answers: list[ShownAnswers] = []
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run in map(Path, runs):
        results = run / "results.json" if run.is_dir() else run
        if results.is_file():
            kept = _of_results(results)
            methods |= kept.methods
            answers.append(kept.answers)
            curves = {**kept.curves, **curves}
        if run.is_dir():
            answers += [_of_items(path) for path in _evaluations(run)]
            for label in dict.fromkeys(record.label for record in read_scores(run)[:1]):
                curves.setdefault(label, _of_metrics(run / "metrics.jsonl"))
    curves = {label: measured for label, measured in curves.items() if measured}
    return Evidence(methods=methods, answers=_joined(answers), curves=curves)


def measures(lines: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """What the lines of a metrics log say along the way: held-out losses, and the share removed."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            shown = REMOVED if name == "removed_fraction" else None
            if name.startswith("eval/") and name.endswith("/loss"):
                shown = f"loss on {name.removeprefix('eval/').removesuffix('/loss')}"
            if shown is not None:
                found.setdefault(shown, []).append((line["step"], value))
    # Where nothing is projected, nothing is removed.
    return {name: points for name, points in found.items() if any(value for _, value in points)}


def _of_results(path: Path) -> Evidence:
    content = read_json(path)
    try:
        return Evidence.model_validate(
            {name: content[name] for name in Evidence.model_fields if name in content}
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}, field {field}: {first['msg'].lower()}; fix it or make the results again."
        ) from error


def _evaluations(run: Path) -> list[Path]:
    found = [*run.glob("evaluation/*/items.jsonl"), *run.glob("*/items.jsonl")]
    return sorted(path for path in found if (path.parent / "results.json").is_file())


def _of_items(path: Path) -> ShownAnswers:
    """The answers that a model wrote, of an evaluation; the newest of each item."""
    label = read_scores(path.parent / "results.json")[0].label
    said: dict[tuple[str, str], str] = {}
    for line in _lines(path):
        if isinstance(line.get("answer"), str) and isinstance(line.get("prompt"), str):
            said[str(line.get("task")), line["prompt"]] = line["answer"]
    asked = [Question(task=task, prompt=prompt) for task, prompt in said]
    return ShownAnswers(asked=asked, given={label: list(said.values())} if said else {})


def _of_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    return measures(line for line in _lines(path) if "step" in line) if path.is_file() else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a line that was cut off is left out."""
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def _joined(parts: Sequence[ShownAnswers]) -> ShownAnswers:
    """The first prompts of each task that every model was asked, and all answers to them."""
    said: dict[str, dict[tuple[str, str], str]] = {}
    questions: dict[tuple[str, str], Question] = {}
    for part in parts:
        keys = [(question.task, question.prompt) for question in part.asked]
        questions = {**dict(zip(keys, part.asked, strict=True)), **questions}
        for label, answers in part.given.items():
            own = dict(zip(keys, answers, strict=False))
            said[label] = {**own, **said.get(label, {})}
    shared = [key for key in questions if all(key in own for own in said.values())]
    tasks = dict.fromkeys(task for task, _ in shared)
    few = [key for task in tasks for key in [k for k in shared if k[0] == task][:_PROMPTS]]
    return ShownAnswers(
        asked=[questions[key] for key in few],
        given={label: [own[key] for key in few] for label, own in said.items() if few},
    )


def shortened(text: str) -> str:
    """As much of a prompt or an answer as a table has room for."""
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS].rstrip()} …"
