"""What an evaluation shows where there is no terminal: lines as it goes, no bars at its end."""

import pytest

from ogpsa_jax.evaluation.progress import Progress


@pytest.fixture
def now():
    return [0.0]


def test_a_file_is_told_when_a_task_begins_while_it_goes_on_and_when_it_ends(capsys, now):
    told = []
    with Progress(True, clock=lambda: now[0]) as bars:
        bar = bars.task("requests [x]", 10)
        for count, seconds in [
            (0, 0.0),
            (2, 59.0),
            (4, 61.0),
            (6, 100.0),
            (10, 101.0),
            (10, 102.0),
        ]:
            now[0] = seconds
            bar.at(count)
            told.append(capsys.readouterr().err)
        judged = bars.task("judge", 2)
        judged.more(1)
        judged.more(1)
    assert told == [
        "requests [x]: 10 items\n",
        "",
        "requests [x]: 4/10\n",
        "",
        "requests [x]: 10/10\n",
        "",
    ]
    assert capsys.readouterr().err == "judge: 2 items\njudge: 2/2\n"


def test_what_is_not_wanted_is_not_shown(capsys, now):
    with Progress(False, clock=lambda: now[0]) as bars:
        bars.task("requests", 1).at(1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
