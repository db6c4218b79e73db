"""Every format is recognised by its columns, in every kind of file that can hold it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ogpsa_jax.data import DataSource, Message, Record, read_records
from ogpsa_jax.data.records import as_context
from ogpsa_jax.errors import InputError


def said(*turns: str) -> tuple[Message, ...]:
    """``role: content`` turns."""
    return tuple(Message(*turn.split(": ", 1)) for turn in turns)


QA = said("user: Q", "assistant: A")
LONG = said("system: S", "user: Q0", "assistant: A0", "user: Q", "assistant: A")
TURNS = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "Q0"},
    {"from": "gpt", "value": "A0"},
    {"from": "human", "value": "Q"},
    {"from": "gpt", "value": "A"},
]
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
MESSAGES = [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in TURNS]
PKU = {
    "prompt": "Q",
    "response_0": "A",
    "response_1": "B",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}

SFT: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, QA),
    "alpaca, input": (
        {"instruction": "Q", "input": "more", "output": "A"},
        said("user: Q\nmore", "assistant: A"),
    ),
    "alpaca, history": (
        {
            "instruction": "Q",
            "output": "A",
            "system": "S",
            "history": [["Q0", "A0"]],
        },
        LONG,
    ),
    "sharegpt": ({"conversations": TURNS}, LONG),
    "sharegpt, system": ({"conversations": TURNS[1:], "system": "S"}, LONG),
    "messages": ({"messages": MESSAGES}, LONG),
    "prompt_completion": ({"prompt": "Q", "completion": "A"}, QA),
    "prompt_completion, response": ({"prompt": "Q", "response": "A"}, QA),
    "prompt_completion, messages": (
        {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
        (*as_context(LONG[:-1]), LONG[-1]),
    ),
    "question_answer": ({"question": "Q", "answer": "A"}, QA),
    "halueval": ({"user_query": "Q", "chatgpt_response": "A", "hallucination": "no"}, QA),
    "pku_saferlhf": (PKU, QA),
    "pku_saferlhf, both safe": (
        {**PKU, "is_response_1_safe": True},
        said("user: Q", "assistant: B"),
    ),
    "pku_saferlhf, pair": ({"prompt": "Q", "response": ["A", "B"]}, QA),
    "preference": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, QA),
    "hh_rlhf": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        QA,
    ),
}
PREFERENCE: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "pku_saferlhf": (PKU, QA[:1]),
    "pku_saferlhf, other way": (
        {**PKU, "response_0": "B", "response_1": "A", "is_response_0_safe": False}
        | {"is_response_1_safe": True, "safer_response_id": 1},
        QA[:1],
    ),
    "pku_saferlhf, pair": ({"prompt": "Q", "response": ["A", "B"]}, QA[:1]),
    "preference": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, QA[:1]),
    "preference, instruction": (
        {"instruction": "Q", "input": "", "output": "A", "chosen": "A", "rejected": "B"},
        QA[:1],
    ),
    "preference, messages": (
        {
            "prompt": MESSAGES[:-1],
            "chosen": MESSAGES[-1:],
            "rejected": [{"role": "assistant", "content": "B"}],
        },
        LONG[:-1],
    ),
    "preference, ultrafeedback": (
        {
            "prompt": "Q",
            "prompt_id": "0",
            "chosen": MESSAGES,
            "rejected": [*MESSAGES[:-1], {"role": "assistant", "content": "B"}],
            "messages": MESSAGES,
            "score_chosen": 8.0,
        },
        LONG[:-1],
    ),
    "preference, sharegpt": (
        {
            "conversations": TURNS[:-1],
            "chosen": TURNS[-1],
            "rejected": {"from": "gpt", "value": "B"},
        },
        LONG[:-1],
    ),
    "hh_rlhf": (
        {
            "chosen": "\n\nHuman: Q0\n\nAssistant: A0\n\nHuman: Q\n\nAssistant: A",
            "rejected": "\n\nHuman: Q0\n\nAssistant: A0\n\nHuman: Q\n\nAssistant: B",
        },
        LONG[1:-1],
    ),
    "hh_rlhf, two turns in a row": (
        {
            "chosen": "\n\nHuman: Q\n\nHuman: more\n\nAssistant: A",
            "rejected": "\n\nHuman: Q\n\nHuman: more\n\nAssistant: B",
        },
        said("user: Q\n\nmore"),
    ),
}


def as_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=2))
    return path


def as_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = path.with_suffix(".parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def as_saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


Writer = Callable[[Path, list[dict[str, Any]]], Path]


@pytest.mark.parametrize("write", [as_json, as_json_lines, as_parquet, as_saved])
@pytest.mark.parametrize("name", SFT)
def test_sft_format_is_recognised(name: str, write: Writer, tmp_path: Path) -> None:
    row, messages = SFT[name]
    path = write(tmp_path / "data", [row, row])
    for format_name in ("auto", name.partition(",")[0]):
        records, skipped, notes = read_records(DataSource(str(path), format=format_name), "sft")
        assert [record.messages for record in records] == [messages, messages]
        assert (skipped.total(), notes) == (0, [])


@pytest.mark.parametrize("write", [as_json, as_json_lines, as_parquet, as_saved])
@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_format_is_recognised(name: str, write: Writer, tmp_path: Path) -> None:
    row, given = PREFERENCE[name]
    path = write(tmp_path / "data", [row])
    for format_name in ("auto", name.partition(",")[0]):
        [record], *_ = read_records(DataSource(str(path), format=format_name), "preference")
        assert (record.messages, record.chosen, record.rejected) == (given, "A", "B")


@pytest.mark.parametrize("name", ["alpaca", "pku_saferlhf", "halueval", "preference", "hh_rlhf"])
def test_flat_rows_are_read_from_csv(name: str, tmp_path: Path) -> None:
    row, messages = SFT[name]
    [record, _], *_ = read_records(DataSource(str(as_csv(tmp_path / "data", [row, row]))), "sft")
    assert record.messages == messages


def test_plain_text_is_one_record(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once\nupon a time")
    [record], *_ = read_records(DataSource(str(tmp_path / "a.txt")), "sft")
    assert record.text == "Once\nupon a time"
    path = as_json_lines(tmp_path / "b", [{"text": "one"}, {"text": "two"}])
    assert [r.text for r in read_records(DataSource(str(path)), "sft")[0]] == ["one", "two"]


def test_rows_that_their_format_discards_are_counted(tmp_path: Path) -> None:
    halueval = {"user_query": "Q", "chatgpt_response": "A", "hallucination": "no"}
    rows = [halueval, {**halueval, "hallucination": "yes"}, halueval]
    records, skipped, _ = read_records(DataSource(str(as_json(tmp_path / "h", rows))), "sft")
    assert (len(records), skipped.total()) == (2, 1)
    unsafe = {**PKU, "is_response_0_safe": False}
    both = {**PKU, "is_response_1_safe": True}
    path = str(as_json(tmp_path / "p", [PKU, unsafe, both]))
    skipped = [read_records(DataSource(path), kind).skipped for kind in ("sft", "preference")]
    assert skipped == [
        {"neither of its answers is safe": 1},
        {"neither of its answers is safe": 1, "both of its answers are safe": 1},
    ]


def test_pair_is_told_to_teach_nothing() -> None:
    asked = said("user: Q")
    assert Record("row", asked, chosen="A", rejected="B").flaw == ""
    assert "equal" in Record("row", asked, chosen="A ", rejected="A").flaw
    assert "chosen answer is empty" in Record("row", asked, chosen=" ", rejected="B").flaw
    assert "rejected answer is empty" in Record("row", asked, chosen="A", rejected="").flaw


MALFORMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "missing": (
        "sft",
        {"instruction": "Q", "output": None},
        "'output' must be text, found nothing",
    ),
    "number": ("sft", {"instruction": 3, "output": "A"}, "'instruction' must be text, found int"),
    "empty": ("sft", {"instruction": "Q", "output": " "}, "'output' is empty"),
    "history": (
        "sft",
        {"instruction": "Q", "output": "A", "history": [["Q"]]},
        "'history' must be a list of",
    ),
    "system": ("sft", {"instruction": "Q", "output": "A", "system": 1}, "'system' must be text"),
    "surrogate": ("sft", {"instruction": "Q\ud800", "output": "A"}, "half a surrogate pair"),
    "no turns": ("sft", {"messages": []}, "expected a list of turns, found an empty list"),
    "turn": (
        "sft",
        {"messages": ["Q"]},
        "turn 1 must have 'role' and 'content', or 'from' and 'value', found str",
    ),
    "role": ("sft", {"messages": [{"role": "owl", "content": "Q"}]}, "turn 1: unknown role 'owl'"),
    "order": ("sft", {"messages": MESSAGES[2:]}, "turns must alternate"),
    "only system": ("sft", {"messages": MESSAGES[:1]}, "turns must alternate"),
    "unanswered": ("sft", {"messages": MESSAGES[:-1]}, "the last turn must be the assistant's"),
    "parts": (
        "sft",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}]},
        "'content' must be text, found list",
    ),
    "verdict": (
        "sft",
        {"user_query": "Q", "chatgpt_response": "A", "hallucination": "maybe"},
        "'hallucination' must be yes or no, found 'maybe'",
    ),
    "flag": ("preference", {**PKU, "is_response_0_safe": 7}, "must be true or false, found 7"),
    "choice": (
        "sft",
        {**PKU, "is_response_1_safe": True, "better_response_id": None},
        "'better_response_id' must be 0 or 1, found None",
    ),
    "pair of three": ("preference", {"prompt": "Q", "response": ["A"]}, "must be a pair"),
    "prompts differ": (
        "preference",
        {"chosen": MESSAGES, "rejected": MESSAGES[1:]},
        "answer different prompts",
    ),
    "transcripts differ": (
        "preference",
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: R\n\nAssistant: A"},
        "answer different prompts",
    ),
    "no transcript": ("preference", {"chosen": "A", "rejected": "B"}, "must be a transcript"),
    "who answers": (
        "preference",
        {"prompt": "Q", "chosen": [{"role": "user", "content": "A"}], "rejected": "B"},
        "'chosen' must end with the assistant's turn, found user",
    ),
    "prompt answered": (
        "preference",
        {"prompt": MESSAGES, "chosen": "A", "rejected": "B"},
        "must end with a user's turn",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_row_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    kind, row, says = MALFORMED[name]
    path = as_json_lines(tmp_path / "data", [row])
    with pytest.raises(InputError) as raised:
        read_records(DataSource(str(path)), kind)  # type: ignore[arg-type]
    assert str(raised.value).startswith(f"{path}, line 1")
    assert says in str(raised.value)


def test_unknown_columns_and_format_names_are_refused_with_the_choices(tmp_path: Path) -> None:
    path = str(as_json_lines(tmp_path / "data", [{"question": "Q", "reply": "A"}]))
    with pytest.raises(InputError, match=r"columns question, reply; known formats: .*alpaca"):
        read_records(DataSource(path), "sft")
    with pytest.raises(InputError, match=r"unknown preference format 'alpaca'; known: .*hh_rlhf"):
        read_records(DataSource(path, format="alpaca"), "preference")
