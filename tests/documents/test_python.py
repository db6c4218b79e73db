"""Every Python block of README.md and docs/ runs as written, page by page."""

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from mktestdocs import check_md_file

from .reading import PAGES, REPOSITORY, blocks

# What a page logs to Weights & Biases: the steps, in order; 0 and the last have an evaluation.
LOGGED = {"docs/python.md": [0, 1, 2, 3, 4, 4]}


class Recorder(types.ModuleType):
    """Takes the place of the `wandb` package, which need not be installed, and never asks it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.steps: list[int] = []

    @contextmanager
    def init(self, *, mode: str, **settings: Any) -> Iterator["Recorder"]:
        assert mode == "offline"
        assert settings.keys() <= {"project", "name", "dir", "config"}
        yield self

    def log(self, values: Mapping[str, Any], *, step: int) -> None:
        assert {"loss", "grad_norm"} <= values.keys() or any("/" in name for name in values)
        self.steps.append(step)


@pytest.fixture(autouse=True)
def wandb(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page, wandb):
    check_md_file(REPOSITORY / page, memory=True)
    assert wandb.steps == LOGGED.get(page, [])


def test_no_python_escapes_this_test():
    """mktestdocs runs blocks marked `python`; another spelling would be shown and never run."""
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
        marks = {fence.strip().removeprefix("```") for fence in fences}
        assert marks <= {"", "python", "bash", "yaml", "bibtex"}, f"{page}: {marks}"
        assert all(fence.startswith("```") for fence in fences), f"{page}: an indented block"
