import csv
import io
import json
import statistics

import pytest

from ogpsa_jax.cli import main
from ogpsa_jax.errors import InputError
from ogpsa_jax.reporting import (
    aggregate,
    csv_table,
    markdown_table,
    pareto_figure,
    report,
    sections,
    text_table,
    to_mind,
)
from ogpsa_jax.reporting.page import html_page
from ogpsa_jax.runs import ScoreRecord, read_scores, write_scores


def _page(records):
    table = sections.scores("Scores", records, None)
    return html_page("Title <b>", "A finding.", "", [table])


def _row(rows, method, stage="sft"):
    return next(row for row in rows if (row.method, row.stage) == (method, stage))


def test_seeds_become_one_row_with_mean_and_standard_deviation(records):
    rows = aggregate(records)
    assert len(rows) == 1 + 2 * 3
    for row in rows[1:]:
        own = [r for r in records if (r.method, r.stage) == (row.method, row.stage)]
        general = [r.scores["general"] for r in own]
        assert row.seeds == 3
        assert row.mean["general"] == pytest.approx(sum(general) / 3)
        assert row.spread["general"] == pytest.approx(statistics.stdev(general))
        assert (row.training_samples, row.reference_samples, row.seconds) == (100, 10, 2.5)
    assert rows[0].spread == {"general": 0.01}  # one seed: its own standard error


def test_the_tax_removed_is_the_share_of_the_general_loss_that_did_not_happen(records):
    rows = aggregate(records)
    for stage in ("sft", "sft+dpo"):
        general = {
            method: statistics.fmean(
                r.scores["general"] for r in records if (r.method, r.stage) == (method, stage)
            )
            for method in ("naive", "ogpsa")
        }
        share = (general["ogpsa"] - general["naive"]) / (0.95 - general["naive"])
        assert _row(rows, "ogpsa", stage).tax_removed == pytest.approx(share)
    assert _row(rows, "naive").tax_removed is None
    assert rows[0].tax_removed is None


def test_a_method_less_safe_than_naive_gets_no_share(records):
    merge = _row(aggregate(records), "merge")
    assert merge.tax_removed is None
    assert "safety below" in merge.tax_note
    assert _row(aggregate(records, matched_safety=0.4), "merge").tax_removed is not None
    ogpsa = _row(aggregate(records, matched_safety=0.999), "ogpsa")
    assert ogpsa.tax_note == "naive is not as safe as asked for"


def test_without_a_base_or_naive_run_the_share_is_left_out(records):
    for method in ("base", "naive"):
        rows = aggregate([record for record in records if record.method != method])
        assert _row(rows, "ogpsa").tax_removed is None
        assert method in _row(rows, "ogpsa").tax_note
    free = [r.model_copy(update={"scores": {**r.scores, "general": 0.96}}) for r in records[1:]]
    assert _row(aggregate([records[0], *free]), "ogpsa").tax_note == "naive pays no tax"


def test_two_models_before_alignment_give_no_share(records):
    other = next(record for record in records if record.method == "base")
    records = [other.model_copy(update={"label": "merged"}), *records]
    rows = [row for row in aggregate(records) if row.method.startswith("ogpsa")]
    assert rows
    assert all(row.tax_removed is None for row in rows)
    assert all("merged" in row.tax_note and other.label in row.tax_note for row in rows)


def test_all_forms_of_the_table_show_the_same_cells(records):
    text, markdown = text_table(records), markdown_table(records)
    page = _page(records)
    share = f"{_row(aggregate(records), 'ogpsa').tax_removed:.0%}"
    for form in (text, markdown, page):
        assert "ogpsa run" in form
        assert share in form
        assert "0.950 ± 0.010" in form
    assert len({len(line) for line in text.splitlines() if not line.startswith(" ")}) == 1
    assert len({line.count("|") for line in markdown.splitlines()}) == 1
    assert "Title &lt;b&gt;" in page
    rows = list(csv.DictReader(io.StringIO(csv_table(records))))
    for row, expected in zip(rows, aggregate(records), strict=True):
        assert row["label"] == expected.label
        assert float(row["general"]) == expected.mean["general"]  # full precision
        if expected.tax_removed is not None:
            assert float(row["tax_removed"]) == expected.tax_removed


def test_a_spread_of_zero_is_not_shown(records):
    same = [r.model_copy(update={"scores": {**r.scores, "safety": 1.0}}) for r in records[1:]]
    for row in aggregate(same):
        assert "safety" not in row.spread
        assert row.spread["general"] > 0
    for form in (text_table(same), markdown_table(same), _page(same)):
        assert "1.000" in form
        assert "1.000 ±" not in form
    (row,) = csv.DictReader(io.StringIO(csv_table(same[:1] + same[3:4])))
    assert row["safety_spread"] == ""


def test_two_definitions_are_never_aggregated(records):
    told = {"safety": "refusal of 3 items by rules 2"}
    records[2] = records[2].model_copy(update={"definitions": told})
    for make in (aggregate, text_table, csv_table, pareto_figure):
        with pytest.raises(InputError, match=r"safety is not the same quantity .*by rules 2"):
            make(records)


def test_a_label_is_no_formula_and_no_second_line(records, tmp_path):
    odd = [record.model_copy(update={"label": f"$x^$ {record.label}"}) for record in records]
    write_scores(tmp_path / "results.json", odd)
    report([tmp_path], tmp_path / "report")
    odd[0] = odd[0].model_copy(update={"label": "two\nlines"})
    write_scores(tmp_path / "results.json", odd)
    with pytest.raises(InputError, match=r"record 1: 'label': .* one line of printable text"):
        report([tmp_path], tmp_path / "report")


def test_two_evaluations_that_disagree_are_told(records, tmp_path):
    for name, value in (("a", 0.2), ("b", 0.8)):
        changed = records[1].model_copy(update={"scores": {"general": value, "safety": 1.0}})
        write_scores(tmp_path / "evaluation" / name / "results.json", [changed])
    with pytest.raises(InputError, match=r"differ in the score general \(0.200 and 0.800\)"):
        read_scores(tmp_path)


def test_a_report_of_runs_is_written_whole_and_needs_nothing_from_elsewhere(records, tmp_path):
    half = len(records) // 2
    write_scores(tmp_path / "one" / "results.json", records[:half], {"note": "free"})
    write_scores(tmp_path / "two" / "evaluation" / "suite" / "results.json", records[half:])
    out = tmp_path / "report"
    assert report([tmp_path / "one", tmp_path / "two"], out) == records
    assert sorted(path.name for path in out.iterdir()) == [
        "pareto.png",
        "report.csv",
        "report.html",
        "report.md",
    ]
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert 'src="data:image/png;base64,' in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page


def test_rows_that_were_to_mind_are_told_in_every_form(records, tmp_path, capsys):
    alike = [
        r.model_copy(update={"asked": {"template": "0a", "stop_tokens": "</s>"}}) for r in records
    ]
    assert to_mind(records) == to_mind(alike) == []
    other = {"template": "none", "stop_tokens": "</s> <|im_end|>"}
    mixed = [alike[0].model_copy(update={"asked": other}), *alike[1:]]
    notes = to_mind(mixed)
    assert [note.split(" (")[0] for note in notes] == [
        "The rows were asked with different chat templates",
        "The rows were asked with different stop tokens",
    ]
    assert "(before: none; naive run, ogpsa run, merge run: 0a)" in notes[0]
    assert "before: not recorded; " in to_mind([records[0], *alike[1:]])[0]
    write_scores(tmp_path / "results.json", mixed)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert notes[0] in capsys.readouterr().out
    assert notes[1] in (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "different stop tokens (before: &lt;/s&gt; &lt;|im_end|&gt;;" in page


def test_a_score_that_some_seeds_lack_or_that_is_no_fraction_is_told(records):
    def without(record):
        return {name: value for name, value in record.scores.items() if name != "safety"}

    lacking = records[1].model_copy(update={"scores": without(records[1])})
    [note] = to_mind([records[0], lacking, *records[2:]])
    assert "The score safety of naive run, stage sft, is that of 2 of its 3 seeds" in note
    percent = records[0].model_copy(update={"scores": {"general": 95.0, "safety": 0.03}})
    [note] = to_mind([percent, *records[1:]])
    assert "The score general of before, stage base, is 95, but scores are fractions" in note


def test_a_tax_within_its_noise_gives_no_share(records, drawn):
    spread = drawn.uniform(0.01, 0.05)

    def one(method, general):
        scores = {"general": general, "safety": 0.9}
        return ScoreRecord(
            label=method, method=method, stage="sft", scores=scores, spread={"general": spread}
        )

    # The standard error of the difference of two is sqrt(2) times that of each.
    for tax, note in ((1.3, "the tax is no larger than its noise"), (1.5, "")):
        rows = [one("base", 0.5 + tax * spread), one("naive", 0.5), one("ogpsa", 0.52)]
        row = _row(aggregate(rows), "ogpsa")
        assert (row.tax_removed is None, row.tax_note) == (bool(note), note)


def test_an_evaluation_says_of_a_record_how_each_part_was_asked(records, tmp_path):
    for name, template in (("a", "0a"), ("b", "none"), ("c", "0a")):
        part = records[1].model_copy(
            update={"asked": {"template": template}, "scores": {name: 0.5}}
        )
        write_scores(tmp_path / "evaluation" / name / "results.json", [part])
    (record,) = read_scores(tmp_path)
    assert record.asked == {"template": "0a / none"}


def test_several_evaluations_of_a_run_are_one_record(records, tmp_path):
    scored = records[1]
    for name, scores in (("a", {"general": 0.5}), ("b", {"safety": 0.7})):
        part = scored.model_copy(update={"scores": scores})
        write_scores(tmp_path / "evaluation" / name / "results.json", [part])
    (record,) = read_scores(tmp_path)
    assert record.scores == {"general": 0.5, "safety": 0.7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "list `records`"),
        ('{"records": [{"method": "naive"}]}', r"record 1: 'label' is missing"),
        (
            '{"records": [{"label": "a", "method": "b", "stage": "c", "scores": {"x": NaN}}]}',
            r"record 1: 'scores.x': .*finite",
        ),
        (
            '{"records": [{"label": "a", "method": "b", "stage": "c", "scores": {}, "sede": 1}]}',
            r"record 1: unknown key 'sede'",
        ),
    ],
)
def test_a_file_that_is_no_result_is_told_in_one_sentence(content, message, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        report([path], tmp_path / "out")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_runs_without_scores_are_told(records, tmp_path):
    with pytest.raises(InputError, match="no such run"):
        report([tmp_path / "absent"])
    with pytest.raises(InputError, match="ogpsa-jax evaluate"):
        report([tmp_path])
    with pytest.raises(InputError, match="at least one run"):
        report([])
    only = records[1].model_copy(update={"scores": {"fluency": 0.1}})
    write_scores(tmp_path / "results.json", [only])
    with pytest.raises(InputError, match="found: fluency"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(InputError, match=r"between 0 and 1, not 95"):
        report([tmp_path], tmp_path / "out", matched_safety=95)


def test_records_survive_the_file(records, tmp_path):
    write_scores(tmp_path / "results.json", records)
    assert read_scores(tmp_path / "results.json") == records
    assert json.loads((tmp_path / "results.json").read_text())["records"][0]["method"] == "base"
