"""A row that calls its answer bad is not trained on, however it says so."""

from pathlib import Path
from typing import Any

import pytest

from ogpsa_jax.errors import InputError
from tests.data.rows import ALPACA, PAIR, QA, TALK, answer, read

# Columns of public layouts that call the row's answer bad, and their value where it is good.
VERDICTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"is_safe": False}, {"is_safe": True}),  # BeaverTails
    ({"is_safe": "False"}, {"is_safe": "True"}),  # the same from a CSV file
    ({"is_safe": 0}, {"is_safe": 1}),
    ({"label": False}, {"label": True}),  # KTO
    ({"kto_tag": "false"}, {"kto_tag": "true"}),  # LLaMA-Factory's KTO
    ({"label": "unsafe"}, {"label": "safe"}),
    ({"safety": "unsafe\nS1"}, {"safety": "safe"}),  # Llama Guard
    ({"response_harm_label": "harmful"}, {"response_harm_label": "unharmful"}),  # WildGuardMix
    ({"is_response_safe": "no"}, {"is_response_safe": "yes"}),
    ({"is_unsafe": True}, {"is_unsafe": False}),
    ({"toxic": 1}, {"toxic": 0}),
    ({"hallucination": "yes"}, {"hallucination": "no"}),
    ({"flagged": True}, {"flagged": False}),
    ({"is_correct": False}, {"is_correct": True}),
    ({"chosen": False}, {"chosen": True}),
    ({"rejected": True}, {"rejected": False}),
    ({"rejected": "A", "chosen": "B"}, {"rejected": "B", "chosen": "A"}),
    ({"score": 0}, {"score": 1}),
    ({"score": "-1.5"}, {"score": "2"}),
    ({"helpfulness": 0, "verbosity": 2}, {"helpfulness": 4, "verbosity": 0}),  # HelpSteer
    ({"response_label": "unsafe"}, {"response_label": "safe"}),  # Aegis
    ({"human_label": "not safe"}, {"human_label": "not harmful"}),
    ({"llama_guard": "unsafe\nS9"}, {"llama_guard": "safe"}),
    ({"label": ["Unsafe"]}, {"label": ["Safe"]}),
    ({"label": -1}, {"label": "good"}),
    ({"isSafe": False}, {"isSafe": True}),
    ({"thumbs_up": False}, {"thumbs_up": True}),
    ({"is_harmful_response": True}, {"is_harmful_response": False}),
    ({"judgement": "incorrect"}, {"judgement": "correct"}),
    ({"meta": {"is_safe": False, "id": 1}}, {"meta": {"is_safe": True, "id": 2}}),
]


@pytest.mark.parametrize(
    "layout", [QA, ALPACA, {"messages": TALK}, {"prompt": "Q", "response": "A"}]
)
@pytest.mark.parametrize(("bad", "good"), VERDICTS)
def test_answer_that_its_row_calls_bad_is_not_trained_on(
    bad: dict[str, Any], good: dict[str, Any], layout: dict[str, Any], tmp_path: Path
) -> None:
    records, skipped, notes = read(tmp_path, {**layout, **bad}, {**layout, **good})
    assert [record.where[-6:] for record in records] == ["line 2"]
    assert skipped.total() == 1
    assert all(any(f"'{column}" in reason for column in bad) for reason in skipped)
    assert notes == []
    with pytest.raises(InputError, match=r"no usable row: 1 row is skipped \("):
        read(tmp_path, {**layout, **bad})


@pytest.mark.parametrize("fields", [{"toxic": True}, {"is_safe": False}, {"score": -1}])
def test_conversation_with_a_turn_that_is_called_bad_is_not_trained_on(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    def talk(**extra: Any) -> dict[str, Any]:
        return {"messages": [TALK[0], answer("A", **extra), TALK[0], answer("B")]}

    of_user = {"messages": [{**TALK[0], "toxic": True}, answer("A")]}
    records, skipped, _ = read(tmp_path, talk(**fields), talk(weight=0, **fields), of_user)
    assert [record.where[-6:] for record in records] == ["line 2", "line 3"]
    assert skipped == {f"'messages[].{next(iter(fields))}' says that the answer is bad": 1}


@pytest.mark.parametrize("column", ["odd", "train", "is_gold"])
def test_column_that_says_false_says_something(column: str, tmp_path: Path) -> None:
    _, _, [note] = read(tmp_path, {**QA, column: False})
    assert f"'{column}' (line 1)" in note
    _, _, [note] = read(tmp_path, {"messages": [TALK[0], answer("A", **{f"{column}_x": False})]})
    assert f"'messages[].{column}_x' (line 1)" in note


@pytest.mark.parametrize("column", ["reward", "toxicity_score", "human_rating"])
def test_other_ratings_that_differ_are_told_too(column: str, tmp_path: Path) -> None:
    records, _, [note] = read(tmp_path, *({**QA, column: number} for number in (-3.0, 0.5)))
    assert len(records) == 2
    assert f"'{column}' rates the answers from -3 to 0.5, and all are trained on" in note


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("is_safe", "perhaps", "'is_safe' must be true or false, found 'perhaps'"),
        ("label", 1, "'label' may judge the answer, but 1 is ambiguous"),
    ],
)
def test_verdict_that_cannot_be_understood_is_refused(
    column: str, value: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        read(tmp_path, {**QA, column: value})


def test_ratings_that_differ_are_told_once(tmp_path: Path) -> None:
    rows = [{**QA, "score": score} for score in (0.0, 1.0, 4.5)]
    records, skipped, [note] = read(tmp_path, *rows)
    assert (len(records), skipped) == (2, {"'score' rates the answer 0 or less": 1})
    assert "'score' rates the answers from 1 to 4.5, and all above 0 are trained on" in note


BAD_PAIRS = [
    ({"score_chosen": 2, "score_rejected": 9.5}, "'score_chosen' is below 'score_rejected'"),
    ({"chosen-rating": "1", "rejected-rating": "3"}, "'chosen-rating' is below"),
    ({"chosen_avg_rating": 1, "rejected_avg_rating": 3}, "'chosen_avg_rating' is below"),
    ({"chosen_is_safe": False}, "'chosen_is_safe' says that the chosen answer is bad"),
    ({"margin": -2.5}, "'margin' is below 0"),
]


@pytest.mark.parametrize("kind", ["sft", "preference"])
@pytest.mark.parametrize(("columns", "says"), BAD_PAIRS)
def test_pair_whose_row_prefers_the_other_answer_is_skipped(
    columns: dict[str, Any], says: str, kind: str, tmp_path: Path
) -> None:
    records, skipped, notes = read(tmp_path, PAIR, {**PAIR, **columns}, kind=kind)
    assert (len(records), skipped.total(), notes) == (1, 1, [])
    assert says in next(iter(skipped))


def test_pku_row_that_contradicts_itself_is_skipped(tmp_path: Path) -> None:
    row = {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1}
    row |= {"is_response_0_safe": True, "is_response_1_safe": False, "safer_response_id": 1}
    with pytest.raises(InputError, match="'safer_response_id' names the unsafe answer"):
        read(tmp_path, row, kind="preference")
