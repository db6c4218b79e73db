"""Small rows of public layouts, and how the tests read them."""

import json
from pathlib import Path
from typing import Any

from ogpsa_jax.data import DataSource, Record, read_records
from ogpsa_jax.data.reading import ReadRows

QA = {"prompt": "Q", "completion": "A"}


ALPACA = {"instruction": "Q", "output": "A"}


TALK = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def read(tmp_path: Path, *rows: dict[str, Any], kind: Any = "sft") -> ReadRows:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_records(DataSource(str(path)), kind)


def said(record: Record) -> list[str]:
    return [f"{m.role}: {m.content}" for m in record.messages]


def answer(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}
