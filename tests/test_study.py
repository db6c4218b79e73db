"""The studies' rules and their accounts; the trials themselves take hours."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ogpsa_jax.demo.scoring import COMPLIANCE, SAFETY

STUDY = Path(__file__).resolve().parents[1] / "scripts/study"
MODULES = ("accounts", "exam", "loop", "real_setting")


def script(name, monkeypatch):
    """A script as a module."""
    monkeypatch.syspath_prepend(str(STUDY))
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trials(monkeypatch):
    yield script("trials", monkeypatch)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def real_model(monkeypatch):
    yield script("real_model", monkeypatch)
    for name in MODULES:
        sys.modules.pop(name, None)


def scores(general, compliance, safety):
    return {"general": general, COMPLIANCE: compliance, SAFETY: safety}


def test_only_what_is_safe_in_every_world_can_be_chosen(trials, tmp_path):
    log = trials.Log(tmp_path / "trials.jsonl")
    regime = trials.REGIMES[0]
    slow, fast, wild = [t for t in trials.grid() if t.method == "naive"][:3]
    for world in trials.TUNED_ON:
        log.add(trials.identity(regime, slow, world), scores(0.5, 0.5, 1.0))
        log.add(trials.identity(regime, fast, world), scores(0.6, 0.5, 0.95))
        unsafe = 0.94 if world == 2 else 1.0
        log.add(trials.identity(regime, wild, world), scores(0.9, 0.9, unsafe))
    assert trials.chosen(log, regime) == {"naive": (fast, True)}
    again = trials.Log(tmp_path / "trials.jsonl")
    assert again.scores == log.scores


def test_where_nothing_is_safe_the_safest_is_taken_and_said_to_be_none(trials, tmp_path):
    log = trials.Log(tmp_path / "trials.jsonl")
    regime = trials.REGIMES[0]
    slow, fast = [t for t in trials.grid() if t.method == "naive"][:2]
    log.add(trials.identity(regime, slow, 0), scores(0.9, 0.9, 0.2))
    log.add(trials.identity(regime, fast, 0), scores(0.1, 0.1, 0.8))
    assert trials.chosen(log, regime) == {"naive": (fast, False)}


def test_rivals_have_as_many_settings_as_ours(trials):
    counts = {}
    for trial in trials.grid():
        counts[trial.method] = counts.get(trial.method, 0) + 1
    assert counts["replay"] >= max(
        count for method, count in counts.items() if method.startswith(("inputs", "the same"))
    )
    rates = {}
    for trial in trials.grid():
        rates.setdefault(trial.method, set()).add(trial.rate)
    assert all(found == set(trials.RATES) for found in rates.values())


def test_every_method_pays_for_what_it_does(trials):
    """1,760 sequences: 110 steps of 16, less the forward passes and the refreshes."""
    by_name = {}
    for trial in trials.grid():
        by_name.setdefault(trial.method, trial)
    assert by_name["naive"].steps(400) == by_name["replay"].steps(400) == 110
    assert by_name["replay of the model"].steps(400) == int((1760 - 400 / 3) // 16)
    assert by_name["inputs + replay of the model"].steps(400) == int((1760 - 800 / 3) // 16)
    assert by_name["OGPSA, paper"].steps(400) == int(1760 // (16 + 48 / 30))


def test_fresh_worlds_are_none_that_anything_was_chosen_on(trials):
    assert not set(trials.TUNED_ON) & set(trials.CONFIRMED_ON)
    assert set(trials.CONFIRMED_ON) == set(range(20, 32))


def losses(real_model, safety, stories, drift=0.0):
    names = (real_model.SAFETY, real_model.STORIES, real_model.DRIFT)
    return dict(zip(names, (safety, stories, drift), strict=True))


@pytest.fixture
def started(real_model, tmp_path):
    """A log of naive tuning: at half the rate it reaches 95 % of what it does at twice."""
    log = real_model.Log(tmp_path / "trials.jsonl")
    naive = {trial.rate: trial for trial in real_model.grid() if trial.method == "naive"}
    for seed in real_model.TUNED_ON:
        log.add(real_model.identity("own", real_model.BEFORE, seed), losses(real_model, 3.0, 1.0))
        for rate, safety, stories in ((0.5, 1.1, 1.2), (1.0, 1.05, 1.5), (2.0, 1.0, 2.0)):
            scores = losses(real_model, safety, stories, drift=stories)
            log.add(real_model.identity("own", naive[rate], seed), scores)
    return log


def test_safety_is_the_share_of_what_naive_tuning_reaches(real_model, started):
    half, _, best, *_ = (trial for trial in real_model.grid() if trial.method == "naive")
    assert real_model.naive(started) == best
    found = real_model.judged(started, "own", half, 0)
    assert found == pytest.approx({"safety": 0.95, "stories": 0.2, "drift": 1.2})
    assert real_model.chosen(started, "own")["naive"] == (half, True)


def test_what_general_answers_lose_counts_where_they_are_the_references(real_model, started):
    weak, strong = (
        next(t for t in real_model.grid() if t.method == "replay" and t.weight == weight)
        for weight in (1.0, 8.0)
    )
    for case in real_model.CASES:
        for seed in real_model.TUNED_ON:
            for trial, stories, drift in ((weak, 1.1, 0.9), (strong, 1.2, 0.1)):
                scores = losses(real_model, 1.1, stories, drift)
                started.add(real_model.identity(case, trial, seed), scores)
    assert real_model.chosen(started, "own")["replay"] == (weak, True)
    assert real_model.chosen(started, "foreign")["replay"] == (strong, True)


def test_rivals_of_the_real_model_have_as_many_settings_as_ours(real_model):
    counts = {}
    for trial in real_model.grid():
        counts[trial.method] = counts.get(trial.method, 0) + 1
    ours = [count for method, count in counts.items() if method.startswith("inputs")]
    assert min(counts["replay"], counts["mixing"], counts["merging"]) >= max(ours)


def test_a_study_of_the_real_model_runs_and_goes_on_where_it_ended(
    real_model, real_data, tmp_path, monkeypatch, capsys
):
    setting = sys.modules["real_setting"]
    compute = sys.modules["loop"].Compute(batch=4, sequences=40, length=32)
    sizes = setting.Sizes(compute, peak=1e-3, references=8, scored=8, story=64)
    tuned, confirmed = (setting.Setting(3, half, sizes) for half in (0, 1))
    seen = [
        {tuple(example.sequences[0].ids) for example in (*one.safe, *one.references["foreign"])}
        for one in (tuned, confirmed)
    ]
    assert len(seen[0] & seen[1]) < 0.02 * len(seen[0])  # some requests are in the file twice
    assert tuned.before[real_model.DRIFT] == pytest.approx(0, abs=1e-5)

    grid = [
        trial
        for trial in real_model.grid()
        if trial.rate in (0.5, 4.0)
        and (trial.method in ("naive", "merging", "inputs alone", "mixing"))
    ]
    monkeypatch.setattr(real_model, "grid", lambda: grid)
    monkeypatch.setattr(real_model, "TUNED_ON", (0,))
    monkeypatch.setattr(real_model, "CONFIRMED_ON", (20, 21))
    monkeypatch.setattr(real_model, "Setting", partial(setting.Setting, sizes=sizes))
    commands = {"tune": real_model.tune, "confirm": real_model.confirm}

    def run(command):
        monkeypatch.setattr(sys, "argv", ["real_model.py", command, "--out", str(tmp_path)])
        module = sys.modules["accounts"]
        assert module.command_line("", "runs", commands, {"report": real_model.report}) == 0
        return capsys.readouterr().out

    run("tune")
    log = real_model.Log(tmp_path / "trials.jsonl")
    methods = [trial for trial in grid if trial.uses_rows]
    assert len(log.scores) == 1 + len(grid) + len(methods)
    naive = [log.scores[real_model.identity("own", trial, 0)] for trial in grid[:1]]
    before = log.scores[real_model.identity("own", real_model.BEFORE, 0)]
    assert naive[0][real_model.SAFETY] < before[real_model.SAFETY] - 0.1
    assert np.isfinite([*naive[0].values()]).all()
    shown = run("confirm")
    finished = (tmp_path / "trials.jsonl").read_text()
    for method in ("naive", "merging", "inputs alone", "mixing"):
        assert shown.count(f"| {method} |") == len(real_model.CASES)
    run("tune")
    run("confirm")
    assert (tmp_path / "trials.jsonl").read_text() == finished
    assert run("report").strip() == shown[shown.index("###") :].strip()
