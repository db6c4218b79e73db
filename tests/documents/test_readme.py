"""The README reads on its own, wherever it is shown, and its figures are the documentation's."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from ogpsa_jax.runs import Cost, ScoreRecord, write_scores

from .reading import REPOSITORY

HOME = "https://github.com/ogpsa-jax/ogpsa_jax"
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_INTO = re.compile(
    rf"(?:{HOME}/(?:blob|tree)|{HOME.replace('github.com', 'raw.githubusercontent.com')})/main"
    r"/([^#]+)(?:#(.+))?"
)
FIVE = ["base", "naive", "replay alone", "ogpsa-paper", "ogpsa-recommended"]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def demo_table(page: Path) -> tuple[str, list[dict[str, str]]]:
    """The title, and the rows by heading, of the table between a page's markers."""
    between = re.search(r"<!-- BEGIN demo -->\n(.*?)<!-- END demo -->", read(page), re.DOTALL)
    assert between is not None
    title, _, table = between[1].strip().partition("\n\n")
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()
    ]
    return title, [dict(zip(head, row, strict=True)) for row in rows]


def test_every_link_is_absolute_and_those_into_the_repository_name_what_it_has():
    links = _LINK.findall(read(REPOSITORY / "README.md"))
    assert not [link for link in links if not link.startswith("https://")]
    into = [_INTO.fullmatch(link) for link in links if "ogpsa-jax/ogpsa_jax" in link]
    assert len(into) > 5
    for found in into:
        assert found is not None
        assert (REPOSITORY / found[1]).exists(), found[0]
        assert found[2] is None or found[2] in anchors(REPOSITORY / found[1]), found[0]


@pytest.mark.parametrize("file", ["pyproject.toml", "mkdocs.yml", "CITATION.cff"])
def test_the_address_is_the_same_everywhere(file):
    assert HOME in read(REPOSITORY / file)


def test_it_is_read_in_one_go():
    assert 100 <= len(read(REPOSITORY / "README.md").splitlines()) <= 130


def check_that_the_tables_agree(repository: Path) -> list[dict[str, str]]:
    """Check README against docs/demo.md; returns the rows of the README."""
    title, short = demo_table(repository / "README.md")
    other, every = demo_table(repository / "docs" / "demo.md")
    assert title == other
    rows = {row["method"]: row for row in every if row["stage"] in ("base", "sft")}
    for row in short:
        assert row.items() <= rows[row["method"]].items()
    return short


def test_its_five_rows_are_those_of_the_whole_table():
    assert len(check_that_the_tables_agree(REPOSITORY)) == len(FIVE)


def test_one_command_puts_the_same_results_into_both_tables(tmp_path, monkeypatch):
    for name in ("scripts", "docs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "README.md", tmp_path)
    drawn = [0.125 * i for i in range(8)]
    records = [
        ScoreRecord(
            label=f"{method}, labelled",
            method=method,
            stage="base" if method == "base" else "sft",
            seed=0,
            scores={
                "general": score,
                "exact_safety": score / 2,
                "prefix_over_refusal": 0.25,
                "exact_benign_compliance": score / 4,
            },
            cost=Cost(training_samples=16),
        )
        for method, score in zip(["mixing", *FIVE[::-1], "LoRA", "merge"], drawn, strict=True)
    ]
    (tmp_path / "demo").mkdir()
    results = tmp_path / "demo" / "results.json"
    write_scores(results, records)
    comparisons = [{"title": "a title of its own", "records": list(range(len(records)))}]
    results.write_text(json.dumps({**json.loads(results.read_text()), "comparisons": comparisons}))

    script = tmp_path / "scripts" / "update_readme.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--demo", str(tmp_path / "demo")])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")

    short = check_that_the_tables_agree(tmp_path)
    assert [row["method"] for row in short] == [f"{method}, labelled" for method in FIVE]
    title, every = demo_table(tmp_path / "docs" / "demo.md")
    assert title == "a title of its own:"
    assert len(every) == len(records) - 1  # merges are drawn in the picture alone
