"""The rows that the official trainer tokenised, token for token and label for label."""

import json
from pathlib import Path

import pytest

from ogpsa_jax.data import ChatTemplate, DataSource, Tokens, load_tokenizer, prepare

RUNS = ("sft", "sft_pg_two", "sft_pg_thr", "dpo", "dpo_pg")


def official_cut(prompt: int, answer: int, limit: int) -> tuple[int, int]:
    """How many tokens of each the official code keeps: it shortens both, in proportion."""
    if answer * 2 < limit:
        most = limit
    elif prompt * 2 < limit:
        most = limit - prompt
    else:
        most = int(limit * answer / (prompt + answer))
    kept = min(most, answer)
    return min(max(limit - kept, 0), prompt), kept


def split(tokens: Tokens) -> tuple[list[int], list[int]]:
    first = int(tokens.loss_mask.argmax())
    assert tokens.loss_mask[first:].all()
    return tokens.ids[:first].tolist(), tokens.ids[first:].tolist()


@pytest.mark.parametrize("run", RUNS)
def test_qwen_template_gives_the_official_rows(run: str, real_data: Path) -> None:
    golden = real_data / "golden"
    recorded = json.loads((golden / "runs" / f"{run}.json").read_text())
    limit = recorded["args"]["cutoff_len"]
    template = ChatTemplate(load_tokenizer(str(golden / "models" / "qwen2")), "qwen")
    for name, rows in recorded["tokenised"].items():
        pairs = "chosen_input_ids" in rows[0]
        examples, _ = prepare(
            [DataSource(str(golden / "data" / f"{name}.json"))],
            template,
            kind="preference" if pairs else "sft",
            max_length=4096,
        )
        prefixes = ("chosen_", "rejected_") if pairs else ("",)
        for example, row in zip(examples, rows, strict=True):
            parts = [split(tokens) for tokens in example.sequences]
            longest = max(len(answer) for _, answer in parts)
            for (prompt, answer), prefix in zip(parts, prefixes, strict=True):
                of_prompt, of_answer = official_cut(len(prompt), longest, limit)
                prompt, answer = prompt[:of_prompt], answer[:of_answer]
                assert prompt + answer == row[f"{prefix}input_ids"]
                assert [-100] * len(prompt) + answer == row[f"{prefix}labels"]
