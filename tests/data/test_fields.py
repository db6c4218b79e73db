"""What a row says in columns that are no format's own is used, refused or told; never lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from ogpsa_jax.data import ChatTemplate, DataSource, prepare
from ogpsa_jax.data.turns import FLAGS
from ogpsa_jax.errors import InputError
from tests.data.rows import ALPACA, PAIR, QA, TALK, answer, read, said


def test_task_is_a_name_or_what_is_to_be_done(tmp_path: Path) -> None:
    assert read(tmp_path, {**QA, "task": "open_qa"}).notes == []
    [note] = read(tmp_path, {**QA, "task": "Translate the text to French."}).notes
    assert "'task' (line 1)" in note


def test_turn_with_two_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has both 'value' and 'content', and they differ"):
        read(tmp_path, {"messages": [{"from": "human", "value": "A", "content": "B"}, TALK[1]]})
    same = {"from": "human", "role": "user", "value": "A", "content": "A"}
    assert len(read(tmp_path, {"messages": [same, TALK[1]]})[0]) == 1


CARRIED = {
    "id": 7,
    "prompt_id": "x",
    "source": "web",
    "dataset": "d",
    "category": {"violence": True},
    "model": "m",
    "score": 3.5,
    "num_turns": 1,
    "created_at": "2024",
    "__index_level_0__": 3,
    "language": "en",
    "tools": [],
    "images": None,
    "system": "",
    "odd": "",
}


@pytest.mark.parametrize("layout", [QA, ALPACA, {"messages": TALK}, {"text": "T"}, PAIR])
def test_ids_sources_scores_and_empty_columns_are_carried_in_silence(
    layout: dict[str, Any], tmp_path: Path
) -> None:
    row = {**CARRIED, **layout}
    records, skipped, notes = read(tmp_path, row, kind="preference" if layout is PAIR else "sft")
    assert (len(records), skipped.total(), notes) == (1, 0, [])


@pytest.mark.parametrize(
    ("layout", "column"),
    [(ALPACA, "prompt"), (QA, "odd"), (PAIR, "output"), ({"messages": TALK}, "instruction")],
)
def test_column_that_nothing_is_known_of_is_named_once(
    layout: dict[str, Any], column: str, tmp_path: Path
) -> None:
    kind = "preference" if layout is PAIR else "sft"
    row = {**layout, column: "something"}
    records, _, [note] = read(tmp_path, layout, row, row, kind=kind)
    assert len(records) == 3
    assert f"does not use '{column}' (2 rows, the first is line 2); remove" in note


def test_all_unused_columns_of_a_file_are_one_note(tmp_path: Path) -> None:
    odd = {f"odd{number}": "x" for number in range(15)}
    _, _, [note] = read(tmp_path, {**QA, **odd}, QA)
    assert "'odd0' (line 1), 'odd1' (line 1)" in note
    assert "and 3 more" in note


def test_rendered_prompt_beside_an_instruction_is_not_the_question(tmp_path: Path) -> None:
    rendered = "### Instruction:\nQ\n### Response:\nA"
    [record], _, [note] = read(tmp_path, {**ALPACA, "input": "I", "prompt": rendered})
    assert said(record) == ["user: Q\nI", "assistant: A"]
    assert "does not use 'prompt' (line 1)" in note


TOOL_CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
PARTS: list[dict[str, Any]] = [
    {**QA, "tools": '[{"name": "f"}]'},
    {**QA, "context": "C"},
    {**QA, "images": ["a.png"]},
    {**QA, "reasoning_content": "R"},
    {**QA, "Complex_CoT": "R"},
    {**QA, "my_thinking_trajectories": ["R"]},
    {**QA, "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": TALK, "tools": [{"name": "f"}]},
    {"messages": TALK, "history": [["Q", "A"]]},
    {"text": "T", "system": "S"},
    {"messages": [TALK[0], {**TALK[1], "tool_calls": [TOOL_CALL]}]},
    {"messages": [TALK[0], {**TALK[1], "content": None, "tool_calls": [TOOL_CALL]}]},
    {"messages": [TALK[0], {**TALK[1], "function_call": {"name": "f"}}]},
    {"messages": [TALK[0], {**TALK[1], "reasoning_content": "R"}]},
    {"messages": [TALK[0], {**TALK[1], "thinking": "R"}]},
    {"messages": [TALK[0], {**TALK[1], "prefix": True}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A", "cot": "R"}]},
    {"prompt": TALK[:1], "completion": [{**TALK[1], "tool_calls": [TOOL_CALL]}]},
    {"prompt": TALK[:1], "completion": {**TALK[1], "reasoning_content": "R"}},
]


@pytest.mark.parametrize("row", PARTS, ids=[str(number) for number in range(len(PARTS))])
def test_part_of_the_text_that_would_be_dropped_is_refused(
    row: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"line 1: '.*' is part of what is asked or answered, but"):
        read(tmp_path, row)


def test_name_of_a_speaker_is_told(tmp_path: Path) -> None:
    _, _, [note] = read(tmp_path, {"messages": [{**TALK[0], "name": "Ann"}, TALK[1]]})
    assert "does not use 'messages[].name' (line 1)" in note


SYSTEMS: list[tuple[str, dict[str, Any]]] = [
    ("sft", QA),
    ("sft", ALPACA),
    ("sft", {"question": "Q", "answer": "A"}),
    ("sft", {"question": "Q", "response": "A"}),  # OpenOrca
    ("sft", {"messages": TALK}),
    ("sft", {"conversations": TALK}),
    ("sft", {"user_query": "Q", "chatgpt_response": "A", "hallucination": "no"}),
    ("sft", PAIR),
    ("preference", PAIR),
    ("preference", {"question": "Q", "chosen": "A", "rejected": "B"}),  # Intel's orca pairs
    ("preference", {"input": "Q", "chosen": "A", "rejected": "B"}),  # Argilla's
    ("preference", {"chosen": TALK, "rejected": [TALK[0], {**TALK[1], "content": "B"}]}),
    ("preference", {"prompt": "Q", "response": ["A", "B"]}),
]


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(("kind", "row"), SYSTEMS)
def test_system_message_of_a_row_leads_it(
    kind: str, row: dict[str, Any], column: str, tmp_path: Path
) -> None:
    [record], _, notes = read(tmp_path, {**row, column: "S"}, kind=kind)
    assert said(record)[:2] == ["system: S", "user: Q"]
    assert notes == []
    with pytest.raises(InputError, match="two different system messages"):
        read(tmp_path, {**row, column: "S", "system_instruction": "T"}, kind=kind)


def test_system_message_may_stand_twice_but_not_two_of_them(tmp_path: Path) -> None:
    led = [{"role": "system", "content": "S"}, *TALK]
    [record], *_ = read(tmp_path, {"messages": led, "system": "S"})
    assert said(record) == ["system: S", "user: Q", "assistant: A"]
    with pytest.raises(InputError, match="two different system messages"):
        read(tmp_path, {"messages": led, "system": "T"})


@pytest.mark.parametrize("flag", FLAGS)
def test_message_that_is_not_to_be_trained_on_is_context(flag: str, tmp_path: Path) -> None:
    turns = [TALK[0], answer("no", **{flag: 0}), TALK[0], answer("yes", **{flag: 1.0})]
    for column in ("messages", "conversations"):
        [record], _, notes = read(tmp_path, {column: turns})
        assert [m.trained for m in record.messages] == [True, False, True, True]
        assert notes == []
    with pytest.raises(InputError, match=r"none of its answers is in the loss mask"):
        read(tmp_path, {"messages": [TALK[0], answer("no", **{flag: False})]})
    with pytest.raises(InputError, match=r"must be 1 \(trained on\) or 0 \(context\), found 0.5"):
        read(tmp_path, {"messages": [TALK[0], answer("no", **{flag: 0.5})]})


def test_refusal_of_a_message_is_what_it_says(tmp_path: Path) -> None:
    [record], *_ = read(tmp_path, {"messages": [TALK[0], answer(None, refusal="No.")]})  # type: ignore[arg-type]
    assert said(record)[-1] == "assistant: No."
    with pytest.raises(InputError, match="both 'content' and 'refusal'"):
        read(tmp_path, {"messages": [TALK[0], answer("A", refusal="No.")]})


def test_all_turns_of_a_completion_are_trained_on_and_none_of_the_prompt(tmp_path: Path) -> None:
    prompt = [TALK[0], answer("given"), TALK[0]]
    row = {"prompt": prompt, "completion": [answer("one"), TALK[0], answer("two")]}
    [record], *_ = read(tmp_path, row)
    assert said(record) == [
        *("user: Q", "assistant: given", "user: Q"),
        *("assistant: one", "user: Q", "assistant: two"),
    ]
    trained = [m.content for m in record.messages if m.role == "assistant" and m.trained]
    assert trained == ["one", "two"]
    with pytest.raises(InputError, match="turns must alternate"):
        read(tmp_path, {"prompt": "Q", "completion": TALK})


CONTRADICTIONS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"messages": TALK, "prompt": "R"}),
    ("sft", {"conversations": TALK, "prompt": "R"}),
    ("preference", {"chosen": TALK, "rejected": [TALK[0], answer("B")], "prompt": "R"}),
    ("preference", {"chosen": TALK, "rejected": [TALK[0], answer("B")], "question": "R"}),
    ("preference", {"chosen": TALK, "rejected": [TALK[0], answer("B")], "messages": TALK[:1] * 1}
     | {"prompt": [{"role": "user", "content": "R"}]}),
    ("preference", {**PAIR, "messages": [{"role": "user", "content": "R"}]}),
    ("preference", {"chosen": TALK, "rejected": [{"role": "user", "content": "R"}, answer("B")]}),
    ("preference", {"prompt": "Q", "chosen": TALK, "rejected": [answer("B")]}),
    ("preference", {"prompt": "Q", "chosen": [answer("A")], "rejected": [TALK[0], answer("B")]}),
    ("preference", {"prompt": "R", "chosen": "\n\nHuman: Q\n\nAssistant: A"}
     | {"rejected": "\n\nHuman: Q\n\nAssistant: B"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row"), CONTRADICTIONS)
def test_row_that_asks_two_things_is_refused(
    kind: str, row: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"not what the user says|different prompts|another conv"):
        read(tmp_path, row, kind=kind)


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {"prompt": "Q", "messages": TALK, "prompt_id": "x"}),  # UltraChat
    ("sft", {"instruction": "Q", "context": "", "response": "A", "category": "qa"}),  # Dolly
    ("sft", {"query": "Q", "response": "A"}),
    ("sft", {"input": "Q", "output": "A"}),
    ("sft", {"prompt": "\n\nHuman: Q\n\nAssistant:", "response": "A"}),  # HH, split
    ("preference", {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": "A", "rejected": "B"}),
    ("preference", {"messages": TALK[:1], "chosen": TALK[1], "rejected": answer("B")}),
    ("preference", {"messages": TALK, "chosen": "A", "rejected": "B"}),
    ("preference", {"instruction": "Q", "chosen_response": "A", "rejected_response": "B"}),
    (
        "preference",
        {"prompt": "Q", "response_0": "B", "response_1": "A", "better_response_id": 1},
    ),
]


@pytest.mark.parametrize(("kind", "row"), LAYOUTS)
def test_public_layout_is_read(kind: str, row: dict[str, Any], tmp_path: Path) -> None:
    [record], skipped, notes = read(tmp_path, row, kind=kind)
    assert (skipped.total(), notes) == (0, [])
    assert said(record)[0] == "user: Q"
    assert (record.chosen or record.messages[-1].content) == "A"
    assert record.rejected in (None, "B")


def test_pair_of_several_turns_in_its_answer_is_refused(tmp_path: Path) -> None:
    turns = [answer("one"), TALK[0], answer("two")]
    with pytest.raises(InputError, match="'chosen' has several turns"):
        read(tmp_path, {"prompt": "Q", "chosen": turns, "rejected": "B"}, kind="preference")


def test_pairs_are_compared_as_tokens_after_cutting(make_tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "why", "chosen": "same start, sand", "rejected": "same start, soil"},
        {"prompt": "why", "chosen": "so", "rejected": "no"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = ChatTemplate(make_tokenizer(), "vanilla")
    options: dict[str, Any] = {"kind": "preference", "max_length": len("why\nsame start, s")}
    examples, report = prepare([DataSource(str(path))], template, **options)
    assert len(examples) == 1
    assert (
        "line 1: chosen and rejected are the same tokens within data.max_length"
        in report.refused[0]
    )
    options["max_length"] += 1
    examples, report = prepare([DataSource(str(path))], template, **options)
    assert (len(examples), report.refused) == (2, [])


def test_only_the_answer_of_a_pair_is_trained_on(make_tokenizer: Any, tmp_path: Path) -> None:
    talk = [TALK[0], answer("given"), TALK[0]]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": talk, "chosen": "so", "rejected": "no"}))
    template = ChatTemplate(make_tokenizer(), "vanilla")
    expectations: dict[Any, list[str]] = {"preference": ["so</s>", "no</s>"], "sft": ["so</s>"]}
    for kind, expected in expectations.items():
        [example], _ = prepare([DataSource(str(path))], template, kind=kind, max_length=99)
        found = [template.tokenizer.decode(t.ids[t.loss_mask]) for t in example.sequences]
        assert found == expected


@pytest.mark.parametrize(
    "asked",
    [
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
        "Q<|im_end|>",
        "Below is a task.\n### Instruction:\nQ\n\n### Response:\n",
        "USER: Q\nASSISTANT:",
        "[INST] Q [/INST]",
    ],
)
def test_prompt_that_is_rendered_already_is_told(
    asked: str, tmp_path: Path, make_tokenizer: Any
) -> None:
    chat = ChatTemplate(make_tokenizer(), "chatml")
    plain = {"prompt": "What does ### Response: mean? Is it [/INST] or Assistant: then?"}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row | {"completion": "A"}) + "\n" for row in (plain, {"prompt": asked}))
    )
    source = DataSource(str(tmp_path / "rows.jsonl"))
    _, report = prepare([source], chat, kind="sft", max_length=512)
    [note] = report.notes
    assert "rows.jsonl, line 2: the prompt contains marks of a chat template" in note
