import json
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ogpsa_jax.errors import InputError
from ogpsa_jax.reporting import report
from ogpsa_jax.reporting.curves import curves_figure
from ogpsa_jax.reporting.evidence import REMOVED, read_evidence
from ogpsa_jax.reporting.finding import finding
from ogpsa_jax.reporting.page import PageSection, Picture, Table, html_page
from ogpsa_jax.reporting.palette import DARK
from ogpsa_jax.runs import write_scores

REPOSITORY = Path(__file__).resolve().parents[2]
_VOID = {"meta", "img", "source"}


class _Elements(HTMLParser):
    """Every element with those that it lies in; refuses what is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found = [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), [*self.open]))
        if tag not in _VOID:
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag


@pytest.fixture
def run(records, tmp_path):
    """A run that kept answers and curves, and one that did not."""
    for name, own in (("one", records[1]), ("two", records[2])):
        folder = tmp_path / name / "evaluation" / "suite"
        own = own.model_copy(update={"label": name, "seed": 0})
        write_scores(folder / "results.json", [own])
        lines = [
            {"task": "harmful", "item": 1, "prompt": "<how?>", "answer": f"{name} & no"},
            {"task": "harmful", "item": 2, "prompt": f"only {name}", "answer": "no"},
            {"task": "sums", "item": 1, "prompt": "1+1", "correct": True},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "items.jsonl").write_text(text + '{"task": "har')
    metrics = [
        {"step": 0, "eval/general/loss": 1.0, "eval/other/loss": 2.0, "rows": {}},
        {"step": 5, "loss": 1.0, "removed_fraction": 0.25},
        {"step": 10, "eval/general/loss": 1.5, "eval/other/loss": 2.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in metrics)
    (tmp_path / "one" / "metrics.jsonl").write_text(text)
    return tmp_path


def test_a_report_finds_the_answers_and_curves_that_runs_kept(run, records):
    kept = read_evidence([run / "one", run / "two"], records)
    assert [question.prompt for question in kept.answers.asked] == ["<how?>"]  # asked of both
    assert kept.answers.given == {"one": ["one & no"], "two": ["two & no"]}
    assert kept.curves == {
        "one": {
            "loss on general": [(0, 1.0), (10, 1.5)],
            "loss on other": [(0, 2.0), (10, 2.5)],
            REMOVED: [(5, 0.25)],
        }
    }
    assert kept.methods["naive"]


def test_curves_name_every_set_and_leave_no_empty_panel(run, records):
    kept = read_evidence([run / "one"], records)
    figure = curves_figure(kept.curves, {})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    titles = [axes.get_title(loc="left").replace("\n", " ") for axes in shown]
    assert titles == ["loss on general", "loss on other", REMOVED]
    assert all(len(axes.lines) == 1 for axes in shown)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one"]


def test_a_results_file_brings_its_own_answers_and_curves(records, tmp_path):
    kept = {
        "methods": {"ogpsa": "what it does"},
        "answers": {
            "asked": [{"task": "sums", "prompt": "1+1", "answer": "2"}],
            "given": {"before": ["3"]},
        },
        "curves": {"ogpsa run": {"loss on sums": [[0, 1.0], [9, 0.5]]}},
    }
    write_scores(tmp_path / "results.json", records, kept)
    report([tmp_path], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("what it does", "1+1", "<td>3</td>", "Along the way"):
        assert text in page
    write_scores(tmp_path / "results.json", records, {"curves": {"a": 3}})
    with pytest.raises(InputError, match=r"results.json, field curves.a"):
        report([tmp_path], tmp_path / "out")


def test_the_finding_comes_first_then_picture_answers_curves_and_tables(run, records, tmp_path):
    write_scores(tmp_path / "all" / "results.json", records)
    runs = [tmp_path / "all", run / "one", run / "two"]
    all_records = report(runs, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    parts = [
        f'<p class="finding">{finding(all_records)}',
        "<picture>",
        "<h2>What each method does</h2>",
        "<h2>Answers before and after</h2>",
        "<h2>Along the way</h2>",
        "<h2>Scores</h2>",
        "<summary>What the numbers mean</summary>",
        "<summary>How the scores were measured</summary>",
    ]
    places = [page.index(part) for part in parts]
    assert places == sorted(places)
    assert "&lt;how?&gt;" in page
    assert "one &amp; no" in page


def test_every_page_is_well_formed_and_no_table_can_widen_it(records, run, tmp_path):
    write_scores(tmp_path / "results.json", records)
    report([tmp_path / "results.json", run / "one", run / "two"], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    elements = _Elements(page).found
    tables = [inside for tag, _, inside in elements if tag == "table"]
    assert len(tables) >= 2
    assert all(("div", "scroll") in inside for inside in tables)
    assert "overflow-x: auto" in page
    assert not {"script", "link", "iframe"} & {tag for tag, _, _ in elements}
    for _, attributes, _ in elements:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a, _ in elements)


def test_a_dark_page_has_dark_pictures(records, tmp_path):
    write_scores(tmp_path / "results.json", records)
    report([tmp_path], tmp_path / "out")
    elements = _Elements((tmp_path / "out" / "report.html").read_text()).found
    dark = [a for tag, a, _ in elements if tag == "source"]
    light = [a for tag, a, _ in elements if tag == "img"]
    assert len(dark) == len(light) > 0
    for one, other in zip(dark, light, strict=True):
        assert one["media"] == "(prefers-color-scheme: dark)"
        assert one["srcset"] != other["src"]
        assert other["alt"]
    style = (REPOSITORY / "ogpsa_jax/reporting/templates/style.css").read_text()
    scheme = style[style.index("prefers-color-scheme: dark") :]
    assert f"--ground: {DARK.ground}" in scheme  # a figure's ground is that of the page


def test_beside_each_score_stands_what_it_does_not_tell(records, tmp_path):
    told = [
        record.model_copy(update={"scores": {**record.scores, "benign_compliance": 0.5}})
        for record in records
    ]
    write_scores(tmp_path / "results.json", told)
    report([tmp_path], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    headings = re.findall(r"<th>(.*?)</th>", page)
    hints = re.findall(r"<td>(.*?)</td>", page[page.index('<tr class="hints">') :])
    beside = dict(zip(headings, hints, strict=False))
    assert headings.index("benign compliance") == headings.index("safety") + 1
    assert "refuses everything" in beside["safety"]
    assert "rightly or not" in beside["benign compliance"]


def test_whatever_a_page_is_given_is_escaped():
    odd = "<b>&'\""
    section = PageSection(
        odd,
        paragraphs=[odd],
        picture=Picture("bGlnaHQ=", "ZGFyaw==", odd, odd),
        terms={odd: odd},
        table=Table([[odd, odd], [odd, odd]], hints={odd: odd}),
        note=odd,
        folded=True,
    )
    page = html_page(odd, odd, odd, [section])
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;&#39;&#34;") == 17
    _Elements(page)


def test_the_wheel_holds_the_templates(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    folder = REPOSITORY / "ogpsa_jax" / "reporting" / "templates"
    templates = {path.relative_to(REPOSITORY).as_posix() for path in folder.iterdir()}
    assert {Path(name).suffix for name in templates} == {".html", ".css", ".md"}
    assert templates <= names
