"""From a task's file to the items that are scored, all of them checked before a model is loaded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ogpsa_jax.data.files import content_of, csv_rows, json_values, parse_json
from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation.suite import (
    ExactMatchTask,
    GreedyMatchTask,
    MultipleChoiceTask,
    OverRefusalTask,
    PerplexityTask,
    RefusalTask,
    Suite,
    Task,
)

# Where public prompt files keep the prompt: XSTest, SimpleSafetyTests, HarmBench, GSM8K and others.
_PROMPT_FIELDS = (
    "prompt",
    "prompts_final",
    "Behavior",
    "question",
    "instruction",
    "instructions",
    "query",
    "user_query",
    "goal",
    "text",
)
_FIELD = re.compile(r"\{(\w+)\}")
_PREFIX = "contrast_"  # XSTest's mark of the types that are unsafe


@dataclass(frozen=True)
class Item:
    """One thing to be scored.

    Attributes:
      id: the number of its row in the file, from 1.
      prompt: what the model gets; for perplexity, the text.
      expected: the right answer, for exact and greedy match.
      choices: the choices, for multiple choice.
      right: the number of the right one.
    """

    id: int
    prompt: str
    expected: str = ""
    choices: tuple[str, ...] = ()
    right: int = -1


def read_items(suite: Suite, task: Task) -> list[Item]:
    """The items of a task: read, filtered, checked, and drawn if there is a limit.

    Raises:
      InputError: a row that is not as the task says; names file, row and field.
    """
    path = Path(task.path)
    separator: str | None = "\n"
    if isinstance(task, PerplexityTask):
        separator = task.separator
    located = list(enumerate(_rows(path, separator), start=1))
    # XSTest's layout: without a label, the type says which requests are unsafe.
    typed = any(str(row.get("type")).startswith(_PREFIX) for _, row in located)
    located = [
        (number, row)
        for number, row in located
        if _wanted(task, row, typed, f"{path}, row {number}")
    ]
    if not located:
        raise InputError(f"{path}: task {task.name} finds no row; correct `where` or the file.")
    if task.limit is not None and task.limit < len(located):
        seed = suite.seed if task.seed is None else task.seed
        drawn = np.random.default_rng(seed).permutation(len(located))[: task.limit]
        located = [located[i] for i in sorted(drawn)]
    return [_item(task, row, number, f"{path}, row {number}") for number, row in located]


def _rows(path: Path, separator: str | None) -> list[dict[str, Any]]:
    """The rows of a file; a separator cuts a txt file into them, without it they are one."""
    content = content_of(path)
    if path.suffix == ".csv":
        return [row for row, _ in csv_rows(content, path)]
    if path.suffix == ".txt":
        parts = [content] if separator is None else [p.strip() for p in content.split(separator)]
        return [{"prompt": part, "text": part} for part in parts if part.strip()]
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{path}: expected a csv, json, jsonl or txt file.")
    name, values = "prompt", None
    if path.suffix == ".json" and content.lstrip()[:1] != "[":
        name, values = _only_list(content, path)
    if values is None:
        values = [value for value, _ in json_values(content, path)]
    rows = []
    for number, row in enumerate(values, start=1):
        if isinstance(row, str):
            row = {name: row, "prompt": row, "text": row}
        if not isinstance(row, dict):
            raise InputError(f"{path}, row {number}: expected an object or a text.")
        rows.append(row)
    return rows


def _only_list(content: str, path: Path) -> tuple[str, list[Any] | None]:
    """The one list of a JSON object and its key; None where the file contains JSON lines."""
    try:
        value = parse_json(content, str(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # more than one value: JSON lines under another name
            return "prompt", None
        raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a list of rows, found {type(value).__name__}.")
    lists = [key for key, items in value.items() if isinstance(items, list)]
    if len(lists) != 1:
        raise InputError(f"{path}: expected a list of rows, or an object that contains one list.")
    return lists[0], value[lists[0]]


def _wanted(task: Task, row: dict[str, Any], typed: bool, where: str) -> bool:
    for field, value in task.where.items():
        if field not in row:
            raise InputError(
                f"{where}: no field '{field}', which `where` of task {task.name} names; known: "
                f"{', '.join(map(str, row))}."
            )
        if str(row[field]) != value:
            return False
    if isinstance(task, RefusalTask | OverRefusalTask):
        if row.get("label") in ("safe", "unsafe"):
            return (row["label"] == "unsafe") == isinstance(task, RefusalTask)
        if typed:
            return str(row.get("type")).startswith(_PREFIX) == isinstance(task, RefusalTask)
    return True


def _item(task: Task, row: dict[str, Any], number: int, where: str) -> Item:
    if isinstance(task, PerplexityTask):
        text = _filled(task.text, row, where, "text")
        if not text:
            raise InputError(f"{where}: the text is empty; fix or remove the row.")
        return Item(number, text)
    if task.prompt is not None:
        prompt = _filled(task.prompt, row, where, "prompt")
    else:
        field = next((name for name in _PROMPT_FIELDS if row.get(name)), None)
        if field is None:
            raise InputError(
                f"{where}: found no prompt among the fields {', '.join(map(str, row))}; set "
                f"`prompt` of task {task.name}, as in '{{my_field}}'."
            )
        prompt = _text(row[field], field, where)
    if not prompt.strip():
        raise InputError(f"{where}: the prompt is empty; fix or remove the row.")
    if isinstance(task, ExactMatchTask):
        expected = _filled(task.answer, row, where, "answer")
        if task.extract_expected is not None:
            found = extracted(task.extract_expected, expected)
            if found is None:
                raise InputError(
                    f"{where}: `extract_expected` of task {task.name} finds nothing in "
                    f"'{expected[-80:]}'; correct the expression."
                )
            expected = found
        return Item(number, prompt, expected=expected)
    if isinstance(task, GreedyMatchTask):
        expected = _filled(task.answer, row, where, "answer")
        if not expected:
            raise InputError(f"{where}: the answer is empty; fix or remove the row.")
        return Item(number, prompt, expected=expected)
    if isinstance(task, MultipleChoiceTask):
        choices = _choices(task, row, where)
        return Item(number, prompt, choices=choices, right=_right(task, row, choices, where))
    return Item(number, prompt)


def _choices(task: MultipleChoiceTask, row: dict[str, Any], where: str) -> tuple[str, ...]:
    if isinstance(task.choices, str):
        found = row.get(task.choices)
        if isinstance(found, dict) and isinstance(found.get("text"), list):  # as ARC has it
            found = found["text"]
        if not isinstance(found, list):
            raise InputError(
                f"{where}: field '{task.choices}' must list the choices; correct `choices` of task "
                f"{task.name}."
            )
        choices = tuple(_text(choice, task.choices, where) for choice in found)
    else:
        choices = tuple(_filled(choice, row, where, "choices") for choice in task.choices)
    if len(choices) < 2 or not all(choices):
        raise InputError(f"{where}: expected at least two choices, none of them empty.")
    return choices


def _right(
    task: MultipleChoiceTask, row: dict[str, Any], choices: tuple[str, ...], where: str
) -> int:
    """The number of the right choice, out of what the row calls it."""
    answer = row.get(task.answer)
    text = str(answer).strip()
    found = row.get(task.choices) if isinstance(task.choices, str) else None
    if isinstance(found, dict) and isinstance(found.get("label"), list):  # as ARC names its choices
        labels = [str(label).strip() for label in found["label"]]
        if labels.count(text) == 1 and len(labels) == len(choices):
            return labels.index(text)
    number = int(text) if re.fullmatch(r"[0-9]{1,4}", text) else -1
    if re.fullmatch(r"[A-Za-z]", text):
        number = ord(text.upper()) - ord("A")
    numbers = {number} if 0 <= number < len(choices) else set()
    if isinstance(answer, str):
        numbers |= {i for i, choice in enumerate(choices) if choice.strip() == text}
    if len(numbers) > 1:
        raise InputError(
            f"{where}: field '{task.answer}', {answer!r}, is the text of one choice and the number "
            "or letter of another; write it as a number from 0, without quotes."
        )
    if not numbers:
        raise InputError(
            f"{where}: field '{task.answer}' must be a number from 0 to {len(choices) - 1}, a "
            f"letter or one of the choices, not {text[:40]!r}."
        )
    return numbers.pop()


def _filled(template: str, row: dict[str, Any], where: str, key: str) -> str:
    def value(match: re.Match[str]) -> str:
        if row.get(match[1]) is None:
            raise InputError(
                f"{where}: no field '{match[1]}', which `{key}` names; known: "
                f"{', '.join(map(str, row))}."
            )
        return _text(row[match[1]], match[1], where)

    return _FIELD.sub(value, template)


def _text(value: Any, field: str, where: str) -> str:
    """A text or a number of a row as text."""
    if isinstance(value, dict | list) or value is None:
        found = "nothing" if value is None else type(value).__name__
        raise InputError(f"{where}: field '{field}' must be text, found {found}; fix the row.")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{where}: field '{field}' has half a surrogate pair, which is not text; fix the row."
        ) from None
    return text


def extracted(pattern: str, text: str) -> str | None:
    """The last match of a pattern (of its group, if it has one), or ``None``."""
    found = re.findall(pattern, text)
    return str(found[-1]) if found else None
