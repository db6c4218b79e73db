"""The study's rule and its accounts; the trials themselves take hours."""

import importlib.util
import sys
from pathlib import Path

import pytest

from ogpsa_jax.demo.scoring import COMPLIANCE, SAFETY

STUDY = Path(__file__).resolve().parents[1] / "scripts/study"


@pytest.fixture
def trials(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(STUDY))
    spec = importlib.util.spec_from_file_location("trials", STUDY / "trials.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trials", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("loop", None)


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
