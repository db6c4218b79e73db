import itertools

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from ogpsa_jax.reporting import aggregate, pareto_figure, text_table
from ogpsa_jax.reporting.labels import Label, place_labels
from ogpsa_jax.reporting.palette import DARK, LIGHT
from ogpsa_jax.runs import ScoreRecord


def test_the_figure_puts_every_row_at_its_scores(records):
    figure = pareto_figure(records, "A title")
    (axes,) = figure.axes
    for row in aggregate(records):
        assert (round(row.mean["general"], 9), round(row.mean["safety"], 9)) in _points(axes)
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[:4] == ["1  before", "2  naive run", "3  ogpsa run", "4  merge run"]
    assert "stage: sft+dpo" in labels
    numbers = [text.get_text() for text in axes.texts if text.get_text().isdecimal()]
    assert sorted(numbers) == sorted("1" + 2 * "234")  # one for each point
    assert figure.get_suptitle() == "A title"
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
        figure = pareto_figure(rows)
        axes, _ = figure.axes
        (legend,) = figure.legends
        colours = [handle.get_color() for handle in legend.legend_handles]
        texts = [text.get_text().split()[1] for text in legend.get_texts()]
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
        ScoreRecord(
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


_PHONE = 390  # pixels across


def test_a_phone_shows_letters_that_can_be_read(records):
    figure = pareto_figure(records[1:], "A finding. " * 15, 0.9)
    (legend,) = figure.legends
    texts = [*legend.get_texts(), *(text for axes in figure.axes for text in axes.texts)]
    for axes in figure.axes:
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels()]
    width, _ = figure.get_size_inches()
    assert len(texts) > 10
    assert min(text.get_fontsize() for text in texts) / 72 * _PHONE / width >= 9


def test_nothing_of_the_figure_is_cut_off(records):
    figure = pareto_figure(records[1:], "A finding. " * 15, 0.9)
    figure.draw_without_rendering()
    whole = figure.bbox
    (legend,) = figure.legends
    texts = [figure._suptitle, *legend.get_texts(), *(t for a in figure.axes for t in a.texts)]
    for text in texts:
        box = text.get_window_extent()
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1, text


def test_labels_of_points_that_lie_on_each_other_are_set_apart(drawn):
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    middle = drawn.uniform(0.2, 0.8), drawn.uniform(0.2, 0.8)
    points = [middle] * 4 + [(drawn.random(), drawn.random()) for _ in range(4)]
    labels = [Label(str(10 + i), x, y, "#123456") for i, (x, y) in enumerate(points)]
    place_labels(axes, labels, size=12)
    figure.draw_without_rendering()
    # Of the letters alone, without the line to the point.
    boxes = [Text.get_window_extent(text).shrunk(0.98, 0.98) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        for pixel in axes.transData.transform(points):
            assert not box.contains(*pixel)
    tied = [text.arrow_patch is not None for text in axes.texts]
    assert all(tied[:4])  # the number says which of the points it is by its line alone


def test_on_dark_ground_every_method_has_a_light_colour(records):
    names = [*LIGHT.fixed, *(f"m{i}" for i in range(len(LIGHT.free)))]
    assert DARK.fixed.keys() == LIGHT.fixed.keys()
    for palette in (LIGHT, DARK):
        colours = palette.of(names)
        assert len(set(colours.values())) == len(names)
    for colour in (*DARK.of(names).values(), DARK.faint):
        assert _contrast(colour, DARK.ground) >= 4.5
    for colour in (*LIGHT.fixed.values(), *LIGHT.free):
        assert _contrast(colour, LIGHT.ground) >= 2
    figure = pareto_figure(records, palette=DARK)
    assert figure.get_facecolor() == figure.axes[0].get_facecolor()
    assert figure.axes[0].xaxis.label.get_color() == "white"


def _contrast(one, other):
    """As the web's accessibility guidelines define it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
