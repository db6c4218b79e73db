"""Every Python block of README.md and docs/ runs as written, page by page."""

import pytest
from mktestdocs import check_md_file

from .reading import PAGES, REPOSITORY, blocks


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page):
    check_md_file(REPOSITORY / page, memory=True)


def test_no_python_escapes_this_test():
    """mktestdocs runs blocks marked `python`; another spelling would be shown and never run."""
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
        marks = {fence.strip().removeprefix("```") for fence in fences}
        assert marks <= {"", "python", "bash", "yaml", "bibtex"}, f"{page}: {marks}"
        assert all(fence.startswith("```") for fence in fences), f"{page}: an indented block"
