"""References taken in turn: which rows each refresh sees, and what the run says it spent."""

import numpy as np
import pytest

from ogpsa_jax.errors import InputError
from ogpsa_jax.training.refreshing import in_turn
from ogpsa_jax.training.run import train

IN_TURN = ("references.batch_size=4", "references.rows_per_refresh=4", "ogpsa.refresh.every=2")


def test_batches_come_in_turn_and_then_again():
    first = {"input_ids": np.arange(3), "mask": 10 * np.arange(3)}
    second = {"input_ids": np.arange(2), "mask": np.arange(2)}
    taken = [in_turn((first, second), number, 2) for number in range(3)]
    assert [list(sets[0]["input_ids"]) for sets in taken] == [[0, 1], [2, 0], [1, 2]]
    assert [list(sets[1]["input_ids"]) for sets in taken] == [[0, 1]] * 3
    assert list(taken[1][0]["mask"]) == [20, 0]
    (whole, _) = in_turn((first, second), 7, None)
    assert whole == first


def test_a_run_says_how_many_reference_rows_it_took(configured, tmp_path, on_some_devices):
    config = configured(tmp_path / "run", *IN_TURN, "references.sets.0.samples=10")
    summary = train(config)
    # Four refreshes in eight steps: batches of 4, 4 and 2 rows, and the first again.
    assert summary.reference_samples == 4 + 4 + 2 + 4
    whole = train(configured(tmp_path / "whole", "references.sets.0.samples=10"))
    assert whole.reference_samples == 2 * 10  # refreshed every five


def test_all_rows_in_turn_is_the_run_without(configured, tmp_path, on_some_devices):
    settings = ("references.batch_size=4", "references.sets.0.samples=12")
    losses = [
        train(configured(tmp_path / name, *settings, *more)).after
        for name, more in (("plain", ()), ("turns", ("references.rows_per_refresh=12",)))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("references.rows_per_refresh=5",), r"not a multiple .* \(4\); take 8"),
        (
            ("references.in_step={share: 0.5}", "ogpsa.refresh=null"),
            "nothing is refreshed at intervals here",
        ),
        (("ogpsa={preset: recommended}",), "nothing is refreshed at intervals here"),
    ],
)
def test_what_cannot_be_taken_in_turn_is_refused(configured, tmp_path, overrides, told):
    with pytest.raises(InputError, match=told):
        configured(tmp_path, *IN_TURN, *overrides)
