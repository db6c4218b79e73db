"""What a run could not use of its rows is told on the terminal and in its summary."""

import json
import logging

import pytest

from ogpsa_jax.config import load_config
from ogpsa_jax.training.prepare import model_config, prepare_data


def test_unused_columns_and_skipped_rows_reach_the_summary_and_the_terminal(
    ground, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "why", "response": f"so {i}", "is_safe": i % 3 > 0, "odd": i} for i in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"{{path: {tmp_path}/rows.jsonl}}"
    overrides = [f"data.train=[{source}]", f"data.eval={{held_out: {source}}}"]
    config = load_config(ground / "run.yaml", overrides)
    caplog.set_level(logging.INFO, "ogpsa_jax")
    data = prepare_data(config, model_config(config))
    assert len(data.train) == 6
    told = data.report()["train"]
    assert told["skipped_rows"] == 3
    assert told["skipped"] == {"'is_safe' says that the answer is bad": 3}
    [warning] = [said for said in data.warnings if "'odd'" in said]
    assert warning.startswith("train, eval.held_out: ")
    assert "does not use 'odd' (6 rows, the first is line 2)" in warning
    assert "train: 3 rows are skipped ('is_safe' says that the answer is bad: 3)" in caplog.text
    assert warning in caplog.text


def test_byte_order_mark_is_no_part_of_a_configuration(ground, tmp_path) -> None:
    text = (ground / "run.yaml").read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8-sig")
    assert load_config(tmp_path / "run.yaml") == load_config(ground / "run.yaml")
