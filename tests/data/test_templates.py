"""What is trained on of a conversation, whatever its template does."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from ogpsa_jax.data import BUILT_IN, ChatTemplate, Message, load_tokenizer
from ogpsa_jax.errors import InputError

Maker = Callable[..., Any]
LETTERS = "aé日☃ \n\t'z"

QWEN3_LIKE = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1].strip() %}
{%- if loop.last %}{{ '<think>\n' }}
{%- if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}
{%- endif %}{{ '\n</think>\n\n' }}{% endif %}{{ said }}
{%- else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(rng: random.Random, *, turns: int | None = None, system: bool = True):
    """Turns of odd characters, many of them short enough to occur in the template's own text."""

    def said() -> str:
        text = "".join(rng.choices(LETTERS, k=rng.randint(1, 8)))
        return text if text.strip() else "a"

    spoken = [
        Message(role, said())
        for _ in range(turns or rng.randint(1, 3))
        for role in ("user", "assistant")
    ]
    return [Message("system", said()), *spoken] if system and rng.random() < 0.5 else spoken


def trained_parts(tokenizer: Any, ids: list[int], loss_mask: list[bool]) -> list[str]:
    """The stretches in the loss mask, as text."""
    parts: list[list[int]] = []
    for i, (token, flag) in enumerate(zip(ids, loss_mask, strict=True)):
        if flag:
            if i == 0 or not loss_mask[i - 1]:
                parts.append([])
            parts[-1].append(token)
    return [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts]


END = {
    "chatml": "<|im_end|>\n",
    "qwen": "<|im_end|>\n",
    "llama3": "<|eot_id|>",
    "llama2": " </s>",
    "mistral": "</s>",
    "alpaca": "</s>",
    "vanilla": "</s>",
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_answer_with_its_end_and_nothing_else_is_trained_on(
    name: str, make_tokenizer: Maker, rng: random.Random
) -> None:
    bos = {"llama3": "<|begin_of_text|>", "llama2": "<s>", "mistral": "<s>"}.get(name)
    eos = {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    tokenizer = make_tokenizer(bos=bos, eos=eos)
    template = ChatTemplate(tokenizer, name)
    space = " " if name in ("llama2", "mistral") else ""
    for _ in range(40):
        turns = conversation(rng)
        ids, loss_mask = template.encode(turns, "row")
        answers = [turn.content for turn in turns if turn.role == "assistant"]
        if name == "llama3":
            answers = [answer.strip() for answer in answers]
        expected = [space + answer + END[name] for answer in answers]
        assert trained_parts(tokenizer, ids, loss_mask) == expected
        assert tokenizer.decode(ids).startswith(template.render(turns).rstrip())


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_answers_are_found_by_whatever_means_the_template_leaves(
    template: str, make_tokenizer: Maker, rng: random.Random, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>")
    (tmp_path / "template.jinja").write_text(MARKED)
    chat = ChatTemplate(
        tokenizer, template if template == "chatml" else str(tmp_path / "template.jinja")
    )
    for _ in range(40):
        turns = conversation(rng)
        parts = trained_parts(tokenizer, *chat.encode(turns, "row"))
        answers = [turn.content for turn in turns if turn.role == "assistant"]
        assert parts == [f"{answer}<|im_end|>\n" for answer in answers]


def test_a_header_that_the_prompt_does_not_hold_is_trained_on(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(BUILT_IN["chatml"].partition("{% if add_generation")[0])
    tokenizer = make_tokenizer(eos="<|im_end|>")
    turns = [Message("user", "q"), Message("assistant", "a")]
    encoded = ChatTemplate(tokenizer, str(tmp_path / "t.jinja")).encode(turns, "row")
    assert trained_parts(tokenizer, *encoded) == ["<|im_start|>assistant\na<|im_end|>\n"]


def test_reasoning_is_trained_on_in_every_turn_though_it_is_absent_from_later_prompts(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(QWEN3_LIKE)
    tokenizer = make_tokenizer(eos="<|im_end|>")
    turns = [
        Message("user", "k"),
        Message("assistant", "<think>why k</think>think"),
        Message("user", "hi"),
        Message("assistant", "<think>why hi</think>k"),
    ]
    chat = ChatTemplate(tokenizer, str(tmp_path / "t.jinja"))
    [first, last] = chat.encode_all([(turns, "row")])[0]  # type: ignore[misc]
    assert trained_parts(tokenizer, *first) == ["<think>\nwhy k\n</think>\n\nthink<|im_end|>\n"]
    assert trained_parts(tokenizer, *last) == ["<think>\nwhy hi\n</think>\n\nk<|im_end|>\n"]
    assert "why k" not in tokenizer.decode(last[0])


def test_generation_prompt_that_opens_a_thought_is_refused_where_no_row_has_one(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    opened = BUILT_IN["chatml"].replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    (tmp_path / "t.jinja").write_text(opened)
    chat = ChatTemplate(make_tokenizer(eos="<|im_end|>"), str(tmp_path / "t.jinja"))
    turns = [Message("user", "is a in assistant?"), Message("assistant", "a")]
    with pytest.raises(InputError, match=r"<think>.n'.*goes on with .*assistant.na<.im_end"):
        chat.encode(turns, "row")
    thinking = [turns[0], Message("assistant", "<think>\nwhy</think>a")]
    parts = trained_parts(chat.tokenizer, *chat.encode(thinking, "row"))
    assert parts == ["why</think>a<|im_end|>\n"]


def test_end_token_is_appended_where_the_template_writes_none(
    make_tokenizer: Maker, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{{ '#' }}{% endfor %}")
    tokenizer = make_tokenizer()
    ids, loss_mask = ChatTemplate(tokenizer, str(tmp_path / "t.jinja")).encode(
        [Message("user", "q"), Message("assistant", "a")], "row"
    )
    assert ids[-1] == tokenizer.eos_token_id
    assert loss_mask[-1]


def test_end_token_is_trained_on_though_it_also_serves_as_padding(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    turns = [Message("user", "q"), Message("assistant", "a")]
    ids, loss_mask = ChatTemplate(tokenizer, "vanilla").encode(turns, "row")
    assert ids[-1] == tokenizer.pad_token_id
    assert loss_mask[-1]


@pytest.mark.parametrize("template", ["llama3", "alpaca"])
def test_beginning_token_is_there_once(
    template: str, make_tokenizer: Maker, rng: random.Random
) -> None:
    tokenizer = make_tokenizer(bos="<|begin_of_text|>", eos="<|eot_id|>")
    chat = ChatTemplate(tokenizer, template)
    turns = conversation(rng)
    for ids in (chat.encode(turns, "row")[0], chat.encode_prompt(turns[:1]), chat.encode_text("a")):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_prompt_tokens_precede_the_answer(make_tokenizer: Maker, rng: random.Random) -> None:
    chat = ChatTemplate(make_tokenizer(eos="<|im_end|>"), "qwen")
    turns = conversation(rng, turns=1)
    ids, loss_mask = chat.encode(turns, "row")
    assert ids[: loss_mask.index(True)] == chat.encode_prompt(turns[:-1])


def test_a_batch_is_encoded_as_its_rows_are(make_tokenizer: Maker, rng: random.Random) -> None:
    chat = ChatTemplate(make_tokenizer(eos="<|im_end|>"), "qwen")
    rows = [(conversation(rng), f"row {i}") for i in range(7)]
    assert chat.encode_all(rows) == [[chat.encode(*row)] for row in rows]


def test_plain_text_needs_no_template_but_a_conversation_does(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer()
    chat = ChatTemplate(tokenizer)
    assert tokenizer.decode(chat.encode_text("told")) == "told</s>"
    with pytest.raises(InputError, match=r"no chat template; set data\.template .*llama3"):
        chat.encode([Message("user", "q"), Message("assistant", "a")], "row")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ 'nothing' }}", "does not show what the assistant says"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not show"),
        ("{% for m in messages %}", "cannot render"),
        ("{{ raise_exception('no systems here') }}", "no systems here"),
    ],
)
def test_useless_template_is_refused(
    source: str, says: str, make_tokenizer: Maker, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(source)
    with pytest.raises(InputError, match=says):
        ChatTemplate(make_tokenizer(), str(tmp_path / "t.jinja"))


def test_unknown_template_is_refused_with_the_choices(make_tokenizer: Maker) -> None:
    with pytest.raises(InputError, match=r"'quen' is neither a readable file nor one of .*qwen"):
        ChatTemplate(make_tokenizer(), "quen")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "{% for m in messages %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
            "row 7: .*no assistant token",
        ),
        (
            "{% for m in messages %}{{ m.content | replace('b', '') }}{% endfor %}",
            "row 7: .*changes or drops the assistant's text",
        ),
        (
            "{% for m in messages %}{% if m.content == 'abc' %}{{ raise_exception('no abc') }}"
            "{% endif %}{{ m.content }}{% endfor %}",
            "row 7: .*no abc",
        ),
    ],
)
def test_template_that_fails_on_a_row_names_the_row(
    source: str, says: str, make_tokenizer: Maker, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(source)
    chat = ChatTemplate(make_tokenizer(), str(tmp_path / "t.jinja"))
    with pytest.raises(InputError, match=says):
        chat.encode([Message("user", "q"), Message("assistant", "abc")], "row 7")


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer could be loaded"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_token_is_refused(make_tokenizer: Maker, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no eos_token"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "folder",
    [
        "data/tokenizers/qwen2.5",
        "data/tokenizers/llama3.1",
        "data/models/stories260k",
        "golden/models/qwen2",
    ],
)
def test_tokenizer_does_what_its_file_says(
    folder: str, real_data: Path, rng: random.Random
) -> None:
    path = real_data / folder
    theirs = Tokenizer.from_file(str(path / "tokenizer.json"))
    ours = load_tokenizer(str(path))
    for _ in range(50):
        text = "".join(rng.choices("The story, é日☃ \n\t'z 12", k=rng.randint(1, 60)))
        assert ours(text, add_special_tokens=False).input_ids == (
            theirs.encode(text, add_special_tokens=False).ids
        )


@pytest.mark.parametrize("name", ["qwen2.5", "llama3.1"])
def test_real_tokenizers_render_as_they_do_themselves(
    name: str, real_data: Path, rng: random.Random
) -> None:
    tokenizer = load_tokenizer(str(real_data / "data" / "tokenizers" / name))
    chat = ChatTemplate(tokenizer)
    for _ in range(20):
        # An answer that begins with white space joins its header there, see test_prompts.
        turns = [replace(turn, content=turn.content.strip()) for turn in conversation(rng)]
        ids, loss_mask = chat.encode(turns, "row")
        theirs = tokenizer.apply_chat_template(
            [{"role": t.role, "content": t.content} for t in turns], return_dict=True
        )
        assert ids == theirs["input_ids"][: len(ids)]
        assert ids[-1] == tokenizer.eos_token_id or ids[-2] == tokenizer.eos_token_id
        answers = [t.content.strip() for t in turns if t.role == "assistant"]
        ends = ("\n", tokenizer.eos_token)
        parts = trained_parts(tokenizer, ids, loss_mask)
        found = [part.removesuffix(ends[0]).removesuffix(ends[1]).strip() for part in parts]
        assert found == answers


def test_stops_are_isolated_from_text(make_tokenizer: Maker, rng: random.Random) -> None:
    """No token is trained on of what precedes an answer, however the turns alternate."""
    tokenizer = make_tokenizer(eos="<|im_end|>")
    chat = ChatTemplate(tokenizer, "chatml")
    ids, loss_mask = chat.encode(conversation(rng, turns=3), "row")
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    starts = [i for i, token in enumerate(ids) if token == start]
    assert not any(loss_mask[i] for i in starts)
    assert sum(any(loss_mask[a:b]) for a, b in pairwise([*starts, len(ids)])) == 3


def test_an_answer_that_is_context_is_not_trained_on(make_tokenizer: Maker) -> None:
    tokenizer = make_tokenizer(eos="<|im_end|>")
    turns = [
        Message("user", "q"),
        Message("assistant", "context", trained=False),
        Message("user", "r"),
        Message("assistant", "answer"),
    ]
    encoded = ChatTemplate(tokenizer, "qwen").encode(turns, "row")
    assert trained_parts(tokenizer, *encoded) == ["answer<|im_end|>\n"]


@pytest.mark.parametrize("place", ["file", "tokenizer"])
def test_byte_order_mark_is_no_part_of_a_template(
    place: str, make_tokenizer: Maker, tmp_path: Path
) -> None:
    (tmp_path / "marked.jinja").write_text(BUILT_IN["chatml"], encoding="utf-8-sig")
    tokenizer = make_tokenizer(template="\ufeff" + BUILT_IN["chatml"])
    template = ChatTemplate(tokenizer, str(tmp_path / "marked.jinja") if place == "file" else None)
    assert template.render([Message("user", "Q")]) == "<|im_start|>user\nQ<|im_end|>\n"
