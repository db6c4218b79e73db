"""The prompt of training is the prompt of use, for templates of every kind in use."""

import datetime
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ogpsa_jax.data import (
    BUILT_IN,
    ChatTemplate,
    DataSource,
    Message,
    load_tokenizer,
    prepare,
)
from ogpsa_jax.errors import InputError

from .test_templates import MARKED, QWEN3_LIKE, conversation, trained_parts

Maker = Callable[..., Any]
END = {"eos": "<|im_end|>"}

# Imitations, in our own words, of how these families' templates behave.
R1_LIKE = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{ '<U>' + m.content }}{% elif m.role == 'system' %}{{ m.content }}
{%- else %}{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"""
R1_LIKE_WITHOUT_PREFILL = R1_LIKE.replace("<A><think>\n", "<A>")
GEMMA_LIKE = """{{ bos_token }}{% if messages[0].role == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n'
+ m.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""
MISTRAL_LIKE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}
{{- '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
PHI_LIKE = """{% for m in messages %}{{ '<' + m.role + '>\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}{{ eos_token }}
{%- endif %}"""
DATED = """{% if date_string is not defined %}{% if strftime_now is defined %}
{%- set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}
{%- endif %}{% endif %}{{ 'Today: ' + date_string + '\n' }}""" + BUILT_IN["chatml"]
SYSTEM_ONLY_IF_USER_IS_LAST = """{% set ns = namespace(s='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}{% elif m.role == 'user' %}
{{- '[INST]' + (ns.s if loop.last else '') + m.content + '[/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"""
SPACED = """{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
NO_HEADER_TO_ASK = BUILT_IN["chatml"].partition("{% if add_generation_prompt %}")[0]
GOOD = {
    **BUILT_IN,
    "gemma": GEMMA_LIKE,
    "mistral-like": MISTRAL_LIKE,
    "phi": PHI_LIKE,
    "qwen3": QWEN3_LIKE,
    "dated": DATED,
    "marked": MARKED,
    "spaced": SPACED,
    "headerless": NO_HEADER_TO_ASK,
}


def chat_of(source: str, tokenizer: Any, tmp_path: Path) -> ChatTemplate:
    path = tmp_path / "template.jinja"
    path.write_text(source, encoding="utf-8")
    return ChatTemplate(tokenizer, str(path))


def assert_prompts_of_use_lead(chat: ChatTemplate, turns: list[Message]) -> None:
    """Each turn trained on, once: after the tokens that ask for it, all the rest of the turn."""
    [sequences] = chat.encode_all([(turns, "row")])
    assert not isinstance(sequences, InputError), sequences
    found = {i: 0 for i, turn in enumerate(turns) if turn.role == "assistant"}
    loss_tokens = sum(sum(loss_mask) for _, loss_mask in sequences)
    for i in found:
        prompt = chat.encode_prompt(turns[:i])
        rest = chat.render(turns[: i + 1])[len(chat.render(turns[:i], generation_prompt=True)) :]
        for ids, loss_mask in sequences:
            start = len(prompt)
            starts = loss_mask[start : start + 1] == [True] and not loss_mask[start - 1]
            if ids[:start] != prompt or not starts:
                continue
            stop = (
                loss_mask[start:].index(False) + start if not all(loss_mask[start:]) else len(ids)
            )
            text = chat.tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
            ending = chat.tokenizer.decode([i for i in chat.stop_tokens() if i in ids[start:stop]])
            assert ending
            eos = chat.tokenizer.eos_token
            whole = rest if ending in rest else rest + eos
            whole = whole[: whole.index(ending) + len(ending)]
            assert text.rstrip().removesuffix(eos) == whole.rstrip().removesuffix(eos)
            found[i] += 1
            loss_tokens -= stop - start
    assert found == dict.fromkeys(found, 1)
    assert loss_tokens == 0


@pytest.mark.parametrize("name", GOOD)
def test_each_turn_follows_the_tokens_that_ask_for_it(
    name: str, make_tokenizer: Maker, rng: random.Random, tmp_path: Path
) -> None:
    eos = "</s>" if name == "phi" else "<|im_end|>"
    chat = chat_of(GOOD[name], make_tokenizer(eos=eos, bos="<s>"), tmp_path)
    for _ in range(30):
        assert_prompts_of_use_lead(chat, conversation(rng, system=name != "gemma"))


@pytest.mark.parametrize("name", ["llama3.1", "qwen2.5"])
def test_real_tokenizers_keep_the_prompt_whatever_an_answer_begins_with(
    name: str, real_data: Path, rng: random.Random
) -> None:
    chat = ChatTemplate(load_tokenizer(str(real_data / "data" / "tokenizers" / name)))
    for _ in range(30):
        turns = conversation(rng, turns=1)
        answer = rng.choice(["\n", "\n\n", " ", "\t\n ", "```\n"]) + turns[-1].content
        assert_prompts_of_use_lead(chat, [*turns[:-1], Message("assistant", answer)])
    theirs = chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
    )
    assert chat.encode_prompt([Message("user", "Hi")]) == theirs["input_ids"]


def test_an_earlier_answer_that_joins_its_prompt_gets_a_sequence_of_its_own(
    real_data: Path,
) -> None:
    chat = ChatTemplate(load_tokenizer(str(real_data / "data" / "tokenizers" / "qwen2.5")))
    said = [("user", "Hi"), ("assistant", "\nOne."), ("user", "And?"), ("assistant", "\nTwo.")]
    turns = [Message(*turn) for turn in said]
    [sequences] = chat.encode_all([(turns, "row")])
    parts = [trained_parts(chat.tokenizer, *sequence) for sequence in sequences]  # type: ignore[misc]
    assert parts == [["\nOne.<|im_end|>\n"], ["\nTwo.<|im_end|>\n"]]
    assert_prompts_of_use_lead(chat, turns)
    with pytest.raises(InputError, match=r"row: .*comes to 2 sequences"):
        chat.encode(turns, "row")


def test_a_pair_has_the_prompt_of_use_on_both_sides(real_data: Path, tmp_path: Path) -> None:
    chat = ChatTemplate(load_tokenizer(str(real_data / "data" / "tokenizers" / "qwen2.5")))
    given = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\nEarlier."}]
    given.append({"role": "user", "content": "Hi"})
    pair = {"prompt": given, "chosen": "\n1. Hello.", "rejected": "1. Go."}
    (tmp_path / "pair.jsonl").write_text(json.dumps(pair) + "\n")
    source = DataSource(str(tmp_path / "pair.jsonl"))
    [example], _ = prepare([source], chat, kind="preference", max_length=256)
    prompt = chat.encode_prompt([Message(m["role"], m["content"]) for m in given])
    for tokens, answer in zip(example.sequences, ("\n1. Hello.", "1. Go."), strict=True):
        assert tokens.ids[: len(prompt)].tolist() == prompt
        assert not tokens.loss_mask[: len(prompt)].any()
        assert tokens.loss_mask[len(prompt) :].all()
        assert chat.tokenizer.decode(tokens.ids[len(prompt) :]) == answer + "<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "said", "says"),
    [
        (
            SYSTEM_ONLY_IF_USER_IS_LAST,
            [("system", "Be brief."), ("user", "q"), ("assistant", "abc")],
            r"row 7: the prompt of use ends with '\[INST\]Be brief.\\n\\nq\[/INST\]'.*"
            r"goes on with '\[INST\]q\[/INST\] abc</s>'",
        ),
        (
            R1_LIKE,
            [("user", "q"), ("assistant", "<think>why</think>abc")],
            r"row 7: .*ends with '<s><U>q<A><think>\\n'.*goes on with '<s><U>q<A>abc</s>'",
        ),
        (
            R1_LIKE_WITHOUT_PREFILL,
            [("user", "q"), ("assistant", "<think>why</think>abc")],
            r"row 7: .*changes or drops .* '<think>why</think>abc', the template 'abc</s>'",
        ),
        (
            BUILT_IN["chatml"],
            [("user", "q"), ("assistant", "see <|im_end|>")],
            r"row 7: the answer contains '<\|im_end\|>', at which generation stops",
        ),
        (
            BUILT_IN["chatml"],
            [("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "</s>")],
            "row 7: turn 4: the answer contains '</s>', at which generation stops",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ '#t' }}"
            "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}",
            [("user", "q"), ("assistant", "abc")],
            r"row 7: .*leaves '#t' of '#tabc' out of {% generation %}",
        ),
        (GEMMA_LIKE, [("system", "s"), ("user", "q"), ("assistant", "a")], "row 7: .*System role"),
        (
            MISTRAL_LIKE.replace(
                "if m.role == 'user'", "if m.role == 'system'%}{% elif m.role == 'user'"
            ),
            [("system", "Be brief."), ("user", "q"), ("assistant", "a")],
            r"row 7: .*drops what the system says: the row says 'Be brief.', .* is '<s>\[INST\] q",
        ),
        (
            BUILT_IN["vanilla"].replace("m['content'] + '\n'", "m['content'][:4] + '\n'"),
            [("user", "question"), ("assistant", "a")],
            "row 7: .*drops what the user says: the row says 'question', .* is 'ques",
        ),
    ],
)
def test_a_row_that_cannot_be_asked_as_it_is_taught_is_refused_with_both_texts(
    source: str,
    said: list[tuple[str, str]],
    says: str,
    make_tokenizer: Maker,
    tmp_path: Path,
) -> None:
    chat = chat_of(source, make_tokenizer(bos="<s>"), tmp_path)
    turns = [Message(*turn) for turn in said]
    with pytest.raises(InputError, match=says):
        chat.encode(turns, "row 7")


def test_a_refused_row_changes_nothing_in_the_rows_beside_it(
    make_tokenizer: Maker, rng: random.Random
) -> None:
    chat = ChatTemplate(make_tokenizer(eos="<|im_end|>"), "qwen")
    good = [(conversation(rng), f"row {i}") for i in range(4)]
    bad = ([Message("user", "q"), Message("assistant", "<|im_end|>")], "row 9")
    found = chat.encode_all([bad, *good[:2], bad, *good[2:]])
    assert [type(found[i]) for i in (0, 3)] == [InputError] * 2
    assert [*found[1:3], *found[4:]] == chat.encode_all(good)


def test_a_prompt_is_there_to_ask_with_though_nothing_can_be_taught(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(bos="<s>")
    chat = chat_of(R1_LIKE, tokenizer, tmp_path)
    assert tokenizer.decode(chat.encode_prompt([Message("user", "q")])) == "<s><U>q<A><think>\n"
    assert chat.stop_tokens() == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("answer", ["⟨answer⟩", "assistant\n", "user", "<|im_start|>", "</think>"])
def test_an_answer_that_looks_like_a_marker_is_trained_on_where_it_stands(
    answer: str, make_tokenizer: Maker
) -> None:
    chat = ChatTemplate(make_tokenizer(eos="<|im_end|>"), "qwen")
    said = [("user", answer), ("assistant", answer), ("user", "assistant"), ("assistant", answer)]
    turns = [Message(*turn) for turn in said]
    assert_prompts_of_use_lead(chat, turns)
    parts = trained_parts(chat.tokenizer, *chat.encode(turns, "row"))
    assert parts == [f"{answer}<|im_end|>\n"] * 2


def test_rows_that_come_to_several_examples_are_counted(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    chat = chat_of(QWEN3_LIKE, make_tokenizer(eos="<|im_end|>"), tmp_path)
    said = [("user", "q"), ("assistant", "<think>why</think>a"), ("user", "r"), ("assistant", "b")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in said[:n]]} for n in (2, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(str(tmp_path / "rows.jsonl"))
    examples, report = prepare([source], chat, kind="sft", max_length=512)
    assert (report.rows, report.split, report.as_dict()["split_rows"]) == (3, 1, 1)
    thought = "<think>\nwhy\n</think>\n\na<|im_end|>\n"
    parts = [
        trained_parts(chat.tokenizer, tokens.ids.tolist(), tokens.loss_mask.tolist())
        for example in examples
        for tokens in example.sequences
    ]
    assert parts == [[thought], [thought], ["<think>\n\n</think>\n\nb<|im_end|>\n"]]
    examples, _ = prepare([source], chat, kind="sft", max_length=512, all_tokens=True)
    assert len(examples) == 2


def test_all_rows_that_a_template_spoils_are_named_at_once(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    chat = chat_of(SYSTEM_ONLY_IF_USER_IS_LAST, make_tokenizer(), tmp_path)
    rows = [
        {"instruction": "q", "output": "a"} | ({"system": "s"} if i % 2 else {}) for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataSource(str(tmp_path / "rows.jsonl"))
    with pytest.raises(
        InputError, match=r"line 2: .*data\.template to one .*\(and 1 row more: line 4\)\.$"
    ):
        prepare([source], chat, kind="sft", max_length=64)


def test_a_template_that_prints_the_date_prints_the_one_it_is_given(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>")
    (tmp_path / "t.jinja").write_text(DATED)
    turns = [Message("user", "q"), Message("assistant", "a")]
    day = datetime.date(2031, 12, 4)
    chat = ChatTemplate(tokenizer, str(tmp_path / "t.jinja"), date=day)
    assert chat.render(turns).startswith("Today: 04 Dec 2031\n")
    by_default = ChatTemplate(tokenizer, str(tmp_path / "t.jinja")).render(turns)
    assert by_default.startswith("Today: 26 Jul 2024\n")
    assert chat.exported == DATED
    with pytest.raises(InputError, match="write the format into the call"):
        chat_of("{% set f = '%Y' %}{{ strftime_now(f) }}" + DATED, tokenizer, tmp_path)
    with pytest.raises(InputError, match="write the format into the call"):
        chat_of("{% set now = strftime_now %}{{ now('%Y') }}" + DATED, tokenizer, tmp_path)


def test_an_end_that_is_no_special_token_is_known(make_tokenizer: Maker, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    ends = [("chatml", ""), ("vanilla", ""), ("alpaca", "")]
    assert [(name, ChatTemplate(tokenizer, name).unknown_end) for name, _ in ends] == ends
    foreign = BUILT_IN["chatml"].replace("<|im_end|>", "<end>")
    assert chat_of(foreign, tokenizer, tmp_path).unknown_end == "<end>"


def test_the_first_token_that_ends_a_turn_is_the_one_to_stop_at(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    chat = chat_of(PHI_LIKE, tokenizer, tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_tokens() == (end, tokenizer.eos_token_id)
    ids, loss_mask = chat.encode([Message("user", "q"), Message("assistant", "a")], "row")
    assert trained_parts(tokenizer, ids, loss_mask) == ["a<|im_end|>\n"]


def test_an_exported_template_writes_the_beginning_token_itself(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    for bos, source in [("<s>", BUILT_IN["alpaca"]), ("<s>", R1_LIKE), (None, BUILT_IN["qwen"])]:
        chat = chat_of(source, make_tokenizer(bos=bos), tmp_path)
        chat.tokenizer.chat_template = chat.exported
        theirs = chat.tokenizer.apply_chat_template(
            [{"role": "user", "content": "q"}], add_generation_prompt=True, return_dict=True
        )
        assert theirs["input_ids"] == chat.encode_prompt([Message("user", "q")])
