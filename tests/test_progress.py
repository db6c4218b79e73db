"""Progress on stderr: lines in a file as the work goes, bars on a terminal."""

import logging
import sys

import pytest

from ogpsa_jax.progress import Progress, quick_bar


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def shown(now):
    with Progress("run", clock=lambda: now[0]) as progress:
        yield progress


def lines_of(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_file_gets_lines_when_a_bar_begins_while_it_goes_on_and_when_it_ends(capsys, now, shown):
    bar = shown.bar("requests [x]", 10, "items")
    lines = [lines_of(capsys)]
    for count, seconds in [(0, 0.0), (2, 4.0), (4, 6.0), (6, 15.0), (8, 16.0), (10, 17.0)]:
        now[0] = seconds
        bar.at(count)
        lines.append(lines_of(capsys))
    bar.at(10)
    assert lines == [
        ["run: requests [x]: 10 items"],
        [],
        [],
        ["run: requests [x]: 4 of 10 items  1.0 items/s, 6 s left"],
        [],
        ["run: requests [x]: 8 of 10 items  0.5 items/s, 4 s left"],
        ["run: requests [x]: 10 of 10 items  0.6 items/s"],
    ]
    assert lines_of(capsys) == []


def test_what_is_not_to_be_shown_is_not_shown(capsys, now):
    with Progress(shown=False, clock=lambda: now[0]) as progress:
        progress.doing("compiling")
        progress.bar("requests", 1, "items").at(1)
        quick_bar("rows", 1, "rows").at(1)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_file_hears_of_slow_work_only_when_it_takes_long(capsys, now, shown):
    shown.doing("reading the data", say=False)
    bar = quick_bar("tokenising a.jsonl", 4000, "rows")
    for done, seconds in [(400, 1.0), (1000, 4.0), (1100, 5.0), (3200, 12.0), (4000, 14.0)]:
        now[0] = seconds
        bar.at(done)
    assert lines_of(capsys) == [
        "run: tokenising a.jsonl: 1,100 of 4,000 rows  175.0 rows/s, 17 s left"
    ]


def test_a_file_hears_now_and_then_of_an_activity_that_takes_long(capsys, now, shown):
    shown.doing("compiling the first step")
    for seconds in range(1, 1001):
        now[0] = float(seconds)
        shown.tell()
    shown.bar("", 2, "steps").at(1, "loss 1.0000")
    now[0] += 4.0
    shown.tell()
    now[0] += 1.0
    shown.tell()
    waits = [5, 15, 35, 75, 155, 315, 615, 915]  # each twice the one before, at most five minutes
    assert lines_of(capsys) == [
        "run: compiling the first step",
        *(f"run: compiling the first step, for {seconds} s so far" for seconds in waits),
        *["run: 1 of 2 steps  loss 1.0000"] * 2,
    ]


def test_a_bar_in_the_block_of_another_is_told_by_its_own_name(capsys, now, shown):
    shown.doing("training")
    with Progress("inner", clock=lambda: now[0]) as inner:
        inner.bar("", 2, "steps").more(2)
    shown.bar("models", 3, "models").more(3)
    assert lines_of(capsys) == [
        "run: training",
        "inner: 2 of 2 steps",
        "run: models: 3 models",
        "run: models: 3 of 3 models",
    ]


def test_a_terminal_shows_what_is_being_done_and_warnings_above_it(monkeypatch, capsys, now):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes what it writes to for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    logger = logging.getLogger()
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    try:
        with Progress("run", clock=lambda: now[0]) as outer:
            outer.doing("compiling the first step")
            now[0] = 42.0
            outer._bars.refresh()
            logger.warning("look here")
            with Progress("inner", clock=lambda: now[0]) as inner:
                inner.bar("", 1234, "steps").at(5, "loss 0.5")
                outer._bars.refresh()
        assert handler.stream is sys.stderr
    finally:
        logger.removeHandler(handler)
    written = capsys.readouterr().err
    assert "compiling the first step, for 42 s so far" in written
    assert "look here\n" in written
    assert "5/1234" in written
    assert "loss 0.5" in written
