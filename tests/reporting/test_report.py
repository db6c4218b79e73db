import csv
import io
import json
import statistics

import pytest

from ogpsa_jax.cli import main
from ogpsa_jax.errors import InputError
from ogpsa_jax.evaluation import Cost, Record, read_records, write_records
from ogpsa_jax.reporting import (
    aggregate,
    csv_table,
    html_page,
    markdown_table,
    pareto_figure,
    report,
    table_html,
    text_table,
    to_mind,
)

_SAFE = {"base": 0.03, "naive": 0.98, "ogpsa": 0.97, "merge": 0.5}


@pytest.fixture
def records(drawn):
    """Three seeds of four methods in two stages; the merge is not safe."""
    rows = []
    for stage in ("sft", "sft+dpo"):
        for seed in range(3):
            for method, general in (("naive", 0.7), ("ogpsa", 0.9), ("merge", 0.93)):
                scores = {
                    "general": general + drawn.uniform(-0.03, 0.03),
                    "safety": _SAFE[method] + drawn.uniform(-0.01, 0.01),
                    "over_refusal": drawn.uniform(0, 0.3),
                }
                cost = Cost(training_samples=100, reference_samples=10 * seed, seconds=2.5)
                rows.append(
                    Record(
                        label=f"{method} run",
                        method=method,
                        stage=stage,
                        seed=seed,
                        scores=scores,
                        cost=cost,
                    )
                )
    base = Record(
        label="before",
        method="base",
        stage="base",
        scores={"general": 0.95, "safety": 0.03},
        spread={"general": 0.01},
    )
    return [base, *rows]


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
    page = html_page("Title <b>", [("Scores", table_html(records))])
    share = f"{_row(aggregate(records), 'ogpsa').tax_removed:.0%}"
    for form in (text, markdown, page):
        assert "ogpsa run" in form
        assert share in form
        assert "0.950 ± 0.010" in form
    assert len({len(line) for line in text.splitlines()[1:2]}) == 1
    assert len({line.count("|") for line in markdown.splitlines()}) == 1
    assert "Title &lt;b&gt;" in page
    rows = list(csv.DictReader(io.StringIO(csv_table(records))))
    for row, expected in zip(rows, aggregate(records), strict=True):
        assert row["label"] == expected.label
        assert float(row["general"]) == expected.mean["general"]  # full precision
        if expected.tax_removed is not None:
            assert float(row["tax_removed"]) == expected.tax_removed


def test_the_figure_puts_every_row_at_its_scores(records):
    figure = pareto_figure(records, "A title")
    (axes,) = figure.axes
    for row in aggregate(records):
        assert (round(row.mean["general"], 9), round(row.mean["safety"], 9)) in _points(axes)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[:4] == ["before", "naive run", "ogpsa run", "merge run"]
    assert "stage: sft+dpo" in labels
    with pytest.raises(ValueError, match="general and a safety score"):
        pareto_figure([records[0].model_copy(update={"scores": {"general": 1.0}})])


def _points(axes):
    return {
        (round(float(x), 9), round(float(y), 9))
        for line in axes.lines
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }


def test_beside_safety_stands_what_became_of_harmless_requests(records):
    _, second = pareto_figure(records[1:]).axes
    assert second.get_ylabel() == "harmless requests refused"
    for row in aggregate(records[1:]):
        assert (round(row.mean["general"], 9), round(row.mean["over_refusal"], 9)) in _points(
            second
        )
    answered = [
        record.model_copy(
            update={"scores": {**record.scores, "benign_compliance": record.seed / 4}}
        )
        for record in records
    ]
    _, second = pareto_figure(answered).axes
    assert second.get_ylabel() == "harmless requests answered"
    assert {y for _, y in _points(second)} == {0.0, 0.25}  # the base, and the mean of three seeds


def test_the_figure_tells_settings_apart_and_draws_the_level_of_safety(records):
    weights = [
        records[1].model_copy(update={"label": f"merge {weight}", "method": "line"})
        for weight in (0.2, 0.8)
    ]
    (axes,) = pareto_figure([*records, *weights], matched_safety=0.93).figure.axes
    names = [text.get_text() for text in axes.texts]
    assert {"0.2", "0.8"} <= set(names)  # settings of one method are told apart on its line
    assert any(list(line.get_ydata()) == [0.93, 0.93] for line in axes.lines)


def test_a_known_method_has_one_colour_in_every_figure_and_no_bar_leaves_the_scale(records):
    def draw(*methods):
        rows = [
            record.model_copy(update={"method": method, "label": method, "spread": {"safety": 0.4}})
            for method, record in zip(methods, records[1:], strict=False)
        ]
        axes, second = pareto_figure(rows).axes
        legend = second.get_legend()
        colours = [handle.get_color() for handle in legend.legend_handles]
        texts = [text.get_text() for text in legend.get_texts()]
        return axes, dict(zip(texts, colours, strict=True))

    axes, first = draw("ogpsa-paper", "mixing", "other")
    _, second = draw("another", "mixing", "ogpsa-paper")
    assert len({*first.values()}) == 3
    assert all(first[name] == second[name] for name in ("ogpsa-paper", "mixing"))
    ends = [
        y
        for bars in axes.containers
        for lines in bars.lines[2]
        for segment in lines.get_segments()
        for _, y in segment
    ]
    assert 0 <= min(ends) < max(ends) <= 1 + 1e-12


def _near(drawn, count, spread, width):
    """Records of one seed whose scores differ by up to `width`, with a standard error."""
    return [
        Record(
            label=f"m{i}",
            method=f"m{i}",
            stage="sft",
            scores={name: 0.6 + drawn.uniform(0, width) for name in ("general", "safety")},
            spread=dict.fromkeys(("general", "safety"), spread),
        )
        for i in range(count)
    ]


def test_noise_does_not_fill_an_axis(drawn):
    spread = drawn.uniform(0.01, 0.08)
    (axes,) = pareto_figure(_near(drawn, 4, spread, 0.3 * spread)).axes
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert high - low >= 10 * spread - 1e-9
    # A difference that is larger than the spreads is drawn as large as there is room for.
    (axes,) = pareto_figure(_near(drawn, 9, 0.001, 0.3)).axes
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert high - low < 0.4
    # Without spreads the least axis is a twentieth of the scale.
    (axes,) = pareto_figure(_near(drawn, 4, 0.0, 1e-4)).axes
    assert axes.get_xlim()[1] - axes.get_xlim()[0] >= 0.05
    # Points at the end of the scale: what an axis needs more goes to the inside.
    ends = [
        record.model_copy(update={"scores": {"general": 1.0, "safety": drawn.choice([0.0, 1.0])}})
        for record in _near(drawn, 3, 0.05, 0.0)
    ]
    (axes,) = pareto_figure(ends).axes
    low, high = axes.get_xlim()
    assert -0.1 < low < 1.0 < high < 1.1
    assert high - low >= 0.5


def test_every_point_and_its_bar_lie_on_the_axes(records):
    for axes in pareto_figure(records[1:]).axes:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for bars in axes.containers:
            for lines in bars.lines[2]:
                for segment in lines.get_segments():
                    for x, y in segment:
                        assert left <= x <= right
                        assert bottom <= y <= top


def test_a_spread_of_zero_is_not_shown(records):
    same = [r.model_copy(update={"scores": {**r.scores, "safety": 1.0}}) for r in records[1:]]
    for row in aggregate(same):
        assert "safety" not in row.spread
        assert row.spread["general"] > 0
    for form in (text_table(same), markdown_table(same), table_html(same)):
        assert "1.000" in form
        assert "1.000 ±" not in form
    (row,) = csv.DictReader(io.StringIO(csv_table(same[:1] + same[3:4])))
    assert row["safety_spread"] == ""


def test_scores_by_exact_match_are_rows_of_their_own_report(records):
    """As the demonstration's: their safety decides the tax removed, and is drawn."""
    exact = [
        record.model_copy(
            update={
                "scores": {
                    "general": record.scores["general"],
                    "exact_safety": record.scores["safety"],
                }
            }
        )
        for record in records
    ]
    for row, other in zip(aggregate(exact), aggregate(records), strict=True):
        assert row.tax_removed == other.tax_removed
        assert "safety" not in row.mean
    (axes,) = pareto_figure(exact).axes
    assert _points(axes) == _points(pareto_figure(records).axes[0])
    assert "exact safety" in text_table(exact)


def test_two_definitions_are_never_aggregated(records):
    told = {"safety": "refusal of 3 items by rules 2"}
    records[2] = records[2].model_copy(update={"definitions": told})
    for make in (aggregate, text_table, csv_table, pareto_figure):
        with pytest.raises(InputError, match=r"safety is not the same quantity .*by rules 2"):
            make(records)


def test_a_label_is_no_formula_and_no_second_line(records, tmp_path):
    odd = [record.model_copy(update={"label": f"$x^$ {record.label}"}) for record in records]
    write_records(tmp_path / "results.json", odd)
    report([tmp_path], tmp_path / "report")
    odd[0] = odd[0].model_copy(update={"label": "two\nlines"})
    write_records(tmp_path / "results.json", odd)
    with pytest.raises(InputError, match=r"record 1, field label: .* one line of printable text"):
        report([tmp_path], tmp_path / "report")


def test_two_evaluations_that_disagree_are_told(records, tmp_path):
    for name, value in (("a", 0.2), ("b", 0.8)):
        changed = records[1].model_copy(update={"scores": {"general": value, "safety": 1.0}})
        write_records(tmp_path / "evaluation" / name / "results.json", [changed])
    with pytest.raises(InputError, match=r"differ in the score general \(0.200 and 0.800\)"):
        read_records(tmp_path)


def test_a_report_of_runs_is_written_whole_and_needs_nothing_from_elsewhere(records, tmp_path):
    half = len(records) // 2
    write_records(tmp_path / "one" / "results.json", records[:half], {"note": "free"})
    write_records(tmp_path / "two" / "evaluation" / "suite" / "results.json", records[half:])
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
    write_records(tmp_path / "results.json", mixed)
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
        return Record(
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
        write_records(tmp_path / "evaluation" / name / "results.json", [part])
    (record,) = read_records(tmp_path)
    assert record.asked == {"template": "0a / none"}


def test_several_evaluations_of_a_run_are_one_record(records, tmp_path):
    scored = records[1]
    for name, scores in (("a", {"general": 0.5}), ("b", {"safety": 0.7})):
        part = scored.model_copy(update={"scores": scores})
        write_records(tmp_path / "evaluation" / name / "results.json", [part])
    (record,) = read_records(tmp_path)
    assert record.scores == {"general": 0.5, "safety": 0.7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "list `records`"),
        ('{"records": [{"method": "naive"}]}', r"record 1, field label: field required"),
        (
            '{"records": [{"label": "a", "method": "b", "stage": "c", "scores": {"x": NaN}}]}',
            r"record 1, field scores.x: .*finite",
        ),
        (
            '{"records": [{"label": "a", "method": "b", "stage": "c", "scores": {}, "sede": 1}]}',
            r"record 1, field sede",
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
    write_records(tmp_path / "results.json", [only])
    with pytest.raises(InputError, match="found: fluency"):
        report([tmp_path], tmp_path / "out")
    with pytest.raises(InputError, match=r"between 0 and 1, not 95"):
        report([tmp_path], tmp_path / "out", matched_safety=95)


def test_records_survive_the_file(records, tmp_path):
    write_records(tmp_path / "results.json", records)
    assert read_records(tmp_path / "results.json") == records
    assert json.loads((tmp_path / "results.json").read_text())["records"][0]["method"] == "base"
