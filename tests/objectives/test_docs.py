"""What docs/dpo.md shows is so."""

from pathlib import Path

import pytest
from mktestdocs import check_md_file

REPOSITORY = Path(__file__).resolve().parents[2]


def test_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    check_md_file(REPOSITORY / "docs" / "dpo.md", memory=True)
