"""The examples of docs/models.md run as written."""

from pathlib import Path

from mktestdocs import check_md_file

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_examples_of_the_page_run() -> None:
    check_md_file(DOCS / "models.md", memory=True)
