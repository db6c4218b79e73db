"""From sources to tokens: what is cut, left out or refused, and what is told of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ogpsa_jax.data import ChatTemplate, DataSource, Example, load_tokenizer, prepare
from ogpsa_jax.data.records import Kind
from ogpsa_jax.errors import InputError

Maker = Callable[..., Any]


@pytest.fixture
def template(make_tokenizer: Maker) -> ChatTemplate:
    """One byte a token: ``Q\\nA</s>``."""
    return ChatTemplate(make_tokenizer(), "vanilla")


def write(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(str(path))


def trained_parts(template: ChatTemplate, example: Example) -> list[str]:
    return [template.tokenizer.decode(t.ids[t.loss_mask]) for t in example.sequences]


def test_answers_are_trained_on_or_all_tokens_but_the_first(
    template: ChatTemplate, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "why", "completion": "so"}])
    [example], report = prepare([source], template, kind="sft", max_length=64)
    assert trained_parts(template, example) == ["so</s>"]
    assert report.as_dict() == {
        "rows": 1,
        "tokens": 7,
        "loss_tokens": 3,
        "truncated_rows": 0,
        "cut_prompts": 0,
        "skipped_rows": 0,
        "refused_rows": 0,
    }
    [example], _ = prepare([source], template, kind="sft", max_length=64, all_tokens=True)
    assert trained_parts(template, example) == ["hy\nso</s>"]
    assert example.sequences[0].ids.dtype == np.int32


def test_long_rows_are_cut_and_counted(
    template: ChatTemplate, tmp_path: Path, rng: random.Random
) -> None:
    lengths = [rng.randint(1, 30) for _ in range(50)]
    rows = [{"prompt": "why", "completion": "a" * length} for length in lengths]
    examples, report = prepare(
        [write(tmp_path / "a.jsonl", rows)], template, kind="sft", max_length=16
    )
    assert [e.length for e in examples] == [min(16, 4 + length + 1) for length in lengths]
    assert report.truncated == sum(4 + length + 1 > 16 for length in lengths)


def test_prompt_that_fills_the_row_is_refused_by_name(
    template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [{"prompt": "q" * n, "completion": "a"} for n in (1, 15, 2, 40)]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        InputError,
        match=r"a\.jsonl, line 2: the prompt alone fills data.max_length \(16 .*line 4.*; raise "
        "data.max_length, set data.too_long to skip or cut, or fix or remove them",
    ):
        prepare([source], template, kind="sft", max_length=16)
    examples, _ = prepare(
        [DataSource(source.path, split="train[:3]")], template, kind="sft", max_length=17
    )
    assert [e.length for e in examples] == [4, 17, 5]


ROWS_OF = {
    "sft": lambda prompt: {"prompt": prompt, "completion": "a"},
    "preference": lambda prompt: {"prompt": prompt, "chosen": "a", "rejected": "bcdef"},
}


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_prompts_that_are_too_long_are_treated_alike_in_sft_and_in_pairs(
    template: ChatTemplate, tmp_path: Path, kind: Kind
) -> None:
    prompts = ["q", "x" + "q" * 60 + "z", "r"]
    source = write(tmp_path / "a.jsonl", [ROWS_OF[kind](prompt) for prompt in prompts])
    with pytest.raises(InputError, match=r"line 2: .* data.too_long to skip or cut"):
        prepare([source], template, kind=kind, max_length=16)
    examples, report = prepare([source], template, kind=kind, max_length=16, too_long="skip")
    assert report.rows == len(examples) == 2
    assert report.truncated == report.cut_prompts == 0
    assert [told.partition(": ")[0] for told in report.refused] == [f"{source.path}, line 2"]
    examples, report = prepare([source], template, kind=kind, max_length=16, too_long="cut")
    assert report.rows == 3
    assert report.truncated == report.cut_prompts == 1
    assert report.refused == []
    # Both ends of the prompt stay, and every answer whole.
    rows = [template.tokenizer.decode(tokens.ids) for tokens in examples[1].sequences]
    if kind == "sft":
        assert rows == ["x" + "q" * 11 + "z\na</s>"]
        assert trained_parts(template, examples[1]) == ["a</s>"]
    else:
        assert rows == ["x" + "q" * 7 + "z\na</s>", "x" + "q" * 7 + "z\nbcdef</s>"]
        assert trained_parts(template, examples[1]) == ["a</s>", "bcdef</s>"]


def test_a_cut_prompt_leaves_a_long_answer_half_of_the_row(
    template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [{"prompt": "x" + "q" * 60 + "z", "completion": "abcdefghijklmnopqrstuvw"}]
    source = write(tmp_path / "a.jsonl", rows)
    [example], _ = prepare([source], template, kind="sft", max_length=16, too_long="cut")
    assert example.length == 16
    assert trained_parts(template, example) == ["abcdefgh"]


def test_prompt_of_all_tokens_may_fill_the_row(template: ChatTemplate, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "q" * 40, "completion": "a"}])
    [example], report = prepare([source], template, kind="sft", max_length=16, all_tokens=True)
    assert trained_parts(template, example) == ["q" * 15]
    assert report.truncated == 1


def test_every_token_of_a_long_text_is_trained_on_once(
    template: ChatTemplate, tmp_path: Path, rng: random.Random
) -> None:
    texts = ["".join(rng.choices("abc", k=rng.randint(1, 70))) for _ in range(20)]
    limit = rng.randint(2, 20)
    source = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    examples, report = prepare([source], template, kind="sft", max_length=limit)
    found = "".join(part for example in examples for part in trained_parts(template, example))
    assert found == "".join(text[1:] + "</s>" for text in texts)
    assert max(example.length for example in examples) <= limit
    assert report.loss_tokens == sum(len(text) for text in texts)


def test_pairs_that_teach_nothing_are_left_out_and_named(
    template: ChatTemplate, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "why", "chosen": "so", "rejected": "no"},
        {"prompt": "why", "chosen": "so", "rejected": "so "},
        {"prompt": "why", "chosen": "", "rejected": "no"},
        {"prompt": "y" * 20, "chosen": "so", "rejected": "no"},
        {"prompt": "why", "chosen": "s" * 20, "rejected": "n" * 20},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    examples, report = prepare(
        [source], template, kind="preference", max_length=16, too_long="skip"
    )
    assert [trained_parts(template, e) for e in examples] == [
        ["so</s>", "no</s>"],
        ["s" * 12, "n" * 12],
    ]
    assert report.truncated == 1
    assert [told.removeprefix(f"{source.path}, ") for told in report.refused] == [
        "line 2: chosen and rejected are equal",
        "line 3: the chosen answer is empty",
        "line 4: the prompt alone fills data.max_length (16 tokens), so nothing is left to learn",
    ]
    assert report.as_dict()["refused"] == report.refused


def test_source_of_useless_pairs_is_refused(template: ChatTemplate, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 3)
    with pytest.raises(InputError, match=r"line 1: chosen and .* equal \(and 2 rows more: line 2"):
        prepare([source], template, kind="preference", max_length=16)


def test_samples_are_drawn_from_the_usable_rows_alone(
    template: ChatTemplate, tmp_path: Path, rng: random.Random
) -> None:
    rows = [
        {"prompt": "why", "chosen": f"s{i}", "rejected": f"s{i}" if i % 2 else "no"}
        for i in range(40)
    ]
    path = write(tmp_path / "a.jsonl", rows).path
    seed = rng.randrange(2**32)

    def drawn(samples: int, seed: int = seed) -> list[str]:
        source = DataSource(path, samples=samples)
        examples, report = prepare([source], template, kind="preference", max_length=16, seed=seed)
        assert report.rows == len(examples) == samples
        return [trained_parts(template, example)[0] for example in examples]

    everything = [f"s{i}</s>" for i in range(0, 40, 2)]
    assert drawn(20) == everything
    assert drawn(7) == drawn(7)
    assert drawn(7) == sorted(set(drawn(7)), key=everything.index)
    assert len({tuple(drawn(7, seed + i)) for i in range(5)}) > 1
    with pytest.raises(InputError, match=r"21 samples asked for, .* contains 20 usable rows"):
        drawn(21)


def test_draw_passes_over_rows_that_are_too_long_and_names_them(
    template: ChatTemplate, tmp_path: Path, rng: random.Random
) -> None:
    long = set(rng.sample(range(8), 3))
    rows = [{"prompt": "q" * (40 if i in long else 1), "completion": "a"} for i in range(8)]
    path = write(tmp_path / "a.jsonl", rows).path
    source, seed = DataSource(path, samples=5), rng.randrange(2**32)
    examples, report = prepare([source], template, kind="sft", max_length=16, seed=seed)
    assert [example.length for example in examples] == [4] * 5
    named = {int(told.partition("line ")[2].partition(":")[0]) - 1 for told in report.refused}
    assert named <= long
    with pytest.raises(InputError, match=r"6 samples asked for, .* contains 5 usable rows"):
        prepare([DataSource(path, samples=6)], template, kind="sft", max_length=16, seed=seed)


def test_examples_know_their_source(template: ChatTemplate, tmp_path: Path) -> None:
    sources = [
        write(tmp_path / f"{i}.jsonl", [{"prompt": "q", "completion": "a"}] * count)
        for i, count in enumerate((2, 3))
    ]
    examples, _ = prepare(sources, template, kind="sft", max_length=16)
    assert [example.source for example in examples] == [0, 0, 1, 1, 1]


def test_rows_of_the_repository_fit_the_smoke_runs() -> None:
    configs = Path(__file__).resolve().parents[2] / "configs"
    template = ChatTemplate(load_tokenizer(str(configs / "models" / "tiny")))
    for name, kind in {
        "safety_sft": "sft",
        "general": "sft",
        "preference": "preference",
    }.items():
        source = DataSource(str(configs / "data" / f"{name}.jsonl"))
        _, report = prepare([source], template, kind=kind, max_length=256)  # type: ignore[arg-type]
        assert (report.rows, report.truncated, report.refused) == (40, 0, [])


STORIES = "models/stories260k"
PKU = "pku_saferlhf_5k/pku_seferlhf_realign_dpo_5k.json"
RASBT = "rasbt_instructions/instruction-data-with-preference.json"


@pytest.mark.parametrize(
    ("path", "tokenizer", "template", "kind"),
    [
        ("safety_tuned_llamas/safety_only_data_Instructions.json", STORIES, "alpaca", "sft"),
        ("halueval/general_data.json", "tokenizers/qwen2.5", None, "sft"),
        (f"{STORIES}/generated_stories.jsonl", STORIES, None, "sft"),
        (PKU, "tokenizers/llama3.1", None, "preference"),
        ("ogpsa_official/dpo_en_demo.json", "tokenizers/qwen2.5", None, "preference"),
        ("ogpsa_official/alpaca_en_demo.json", "tokenizers/llama3.1", None, "sft"),
        (RASBT, STORIES, "vanilla", "preference"),
        ("gsm8k/train.jsonl", "tokenizers/qwen2.5", None, "sft"),
    ],
)
def test_real_data_end_with_an_end_token_in_the_loss_mask(
    path: str, tokenizer: str, template: str | None, kind: Any, real_data: Path, rng: random.Random
) -> None:
    data = real_data / "data"
    chat = ChatTemplate(load_tokenizer(str(data / tokenizer)), template)
    seed = rng.randrange(2**32)
    source = DataSource(str(data / path), samples=100)
    examples, report = prepare([source], chat, kind=kind, max_length=8192, seed=seed)
    assert (len(examples), report.truncated) == (100, 0)
    eos = chat.tokenizer.eos_token_id
    for example in examples:
        for tokens in example.sequences:
            assert eos in tokens.ids[tokens.loss_mask][-2:]
            assert tokens.loss_mask[-1]
