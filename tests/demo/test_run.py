import importlib
import json
import random
import statistics
from pathlib import Path

import pytest
import yaml
from markupsafe import escape

from ogpsa_jax.config import RunConfig, load_config
from ogpsa_jax.data import load_tokenizer
from ogpsa_jax.demo import run
from ogpsa_jax.demo.findings import findings
from ogpsa_jax.demo.folder import (
    BEGINNING,
    Folder,
    read_answers,
    write_model,
    write_tokenizer,
    write_world,
)
from ogpsa_jax.demo.methods import BATCH, METHODS, SEQUENCES, configuration
from ogpsa_jax.demo.pretraining import one_device, pretrain
from ogpsa_jax.demo.recipe import MATCHED_SAFETY, RECIPES, Comparison, Pretraining, Recipe
from ogpsa_jax.demo.scoring import COMPLIANCE, OVER_REFUSAL, SAFETY
from ogpsa_jax.demo.settings import EASY, SETTINGS
from ogpsa_jax.demo.world import REFUSAL, TOKENIZER, World
from ogpsa_jax.evaluation import ModelOptions, evaluate
from ogpsa_jax.models import load_pretrained
from ogpsa_jax.runs import ScoreRecord, read_scores
from ogpsa_jax.training import run as training
from ogpsa_jax.training.step import Network

_PRETRAINING = Pretraining(
    tasks=("copy", "facts"), facts=4, items=500, steps=6, rows=8, width=16, layers=1
)
_TINY = Recipe(
    _PRETRAINING,
    worlds=2,
    comparisons=(
        Comparison(EASY, ("naive", "recommended"), dpo=True),
        Comparison(EASY, ("naive",)),
    ),
)

ONE_DEVICE = ModelOptions(mesh=(1, 1, 1))


def demonstrate(out):
    """With few steps, few worlds, and one device, for which less is compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "quick", _TINY)
        patch.setitem(SEQUENCES, "sft", 110)
        patch.setitem(SEQUENCES, "dpo", 110)
        patch.setattr(run, "MERGED", (0.5,))
        patch.setattr(training, "make_mesh", lambda section: one_device())
        return run.run_demo(out, "quick", seed=3)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demonstrate(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The files of a world whose model gets some answers right and some wrong."""
    folder = Folder(tmp_path_factory.mktemp("world"))
    world = World(0, _PRETRAINING.tasks, _PRETRAINING.facts)
    longer = Pretraining(**{**_PRETRAINING.__dict__, "steps": 120, "width": 32})
    write_world(world, folder, [])
    write_model(pretrain(longer, world, one_device(), folder.path / "run").model(), folder)
    return world, folder


def test_the_tokenizer_gives_the_ids_of_the_world(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    seed = random.SystemRandom().randrange(2**31)
    print(f"items drawn with seed {seed}")
    for item in World(seed).draw_general(100, seed):
        turns = [
            {"role": "user", "content": item.prompt},
            {"role": "assistant", "content": item.answer},
        ]
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        assert ids == TOKENIZER.sequence(item.prompt, item.answer).ids.tolist()
        asked = tokenizer.apply_chat_template(
            turns[:1], add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(asked)] == asked
        assert tokenizer.decode(ids[len(asked) :], skip_special_tokens=True) == item.answer
    with pytest.raises(Exception, match="UNK"):
        tokenizer("\u00e4")


def test_scores_are_those_of_greedy_answers(trained, tmp_path):
    """The suite asks one forward pass; here the same model writes its answers."""
    world, folder = trained
    evaluate(
        folder.model,
        folder.scores,
        tmp_path / "scores",
        options=ONE_DEVICE,
        progress=False,
    )
    lines = _lines(tmp_path / "scores" / "items.jsonl")
    answered = {"kind": "exact_match", "answer": "{response}", "max_new_tokens": 24}
    tasks = [
        {"name": name, "path": folder.data(f"held-out-{name}"), "limit": 60, **answered}
        for name in (*world.general, SAFETY, OVER_REFUSAL, COMPLIANCE)
    ]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "written", "tasks": tasks}))
    evaluate(
        folder.model,
        tmp_path / "suite.yaml",
        tmp_path / "said",
        options=ONE_DEVICE,
        progress=False,
    )
    right = {(line["task"], line["item"]): line["correct"] for line in lines}
    compared = set()
    for said in _lines(tmp_path / "said" / "items.jsonl"):
        exact = said["answer"] == said["expected"]
        if said["task"] == OVER_REFUSAL:
            exact = said["answer"].startswith(BEGINNING)
        assert right[said["task"], said["item"]] == exact
        compared.add(exact)
    assert compared == {True, False}  # or nothing would have been compared


def test_the_studys_exam_gives_the_scores_of_the_suite(trained, tmp_path, monkeypatch):
    world, folder = trained
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts" / "study"))
    exam = importlib.import_module("exam")
    model = load_pretrained(folder.model, dtype="float32", param_dtype="float32")
    scores = exam.Exam(world).score(Network.of(model))
    evaluate(folder.model, folder.scores, tmp_path, options=ONE_DEVICE, progress=False)
    (record,) = read_scores(tmp_path)
    assert scores == pytest.approx({name: record.scores[name] for name in scores})
    assert len(scores) == 4


def test_scores_are_recomputed_from_the_outcomes_of_the_items(demonstration):
    out, _ = demonstration
    scored = sorted(out.glob("world-*/runs/*/evaluation/scores"))
    assert len(scored) == 2 * 4  # two stages of two methods in two worlds
    for folder in scored:
        right = {}
        for line in _lines(folder / "items.jsonl"):
            right.setdefault(line["task"], []).append(line["correct"])
        shares = {task: statistics.fmean(correct) for task, correct in right.items()}
        (record,) = read_scores(folder)
        tasks = [shares[name] for name in _PRETRAINING.tasks]
        assert record.scores == pytest.approx({**shares, "general": statistics.fmean(tasks)})
        # What rules or a judge measure has no score of the same name here.
        assert not {"safety", "over_refusal", "benign_compliance"} & record.scores.keys()


def test_every_method_stage_and_world_has_its_record(demonstration):
    out, results = demonstration
    records = read_scores(out)
    keys = {(r.label, r.stage, r.seed) for r in records}
    aligned = {
        (label, stage, seed)
        for label in ("naive", "OGPSA recommended, 80 rows")
        for stage in ("sft", "sft+dpo")
        for seed in (3, 4)
    }
    merged = {("merge 0.5", "sft+dpo", seed) for seed in (3, 4)}  # of what all stages came to
    base = {("before alignment", "base", seed) for seed in (3, 4)}
    assert keys == aligned | merged | base
    assert len(records) == len(keys)
    one, other = ([records[i] for i in each["records"]] for each in results["comparisons"])
    assert {r.label for r in other} == {"before alignment", "naive"}
    assert {r.stage for r in other} == {"base", "sft"}
    assert {(r.label, r.stage, r.seed) for r in one} == keys
    for record in records:
        assert record.definitions.keys() == record.scores.keys()


def test_costs_are_the_sequences_of_both_stages(demonstration):
    out, _ = demonstration
    costs = {(r.label, r.stage): r.cost for r in read_scores(out)}
    naive = costs["naive", "sft+dpo"]
    ours = costs["OGPSA recommended, 80 rows", "sft+dpo"]
    assert (naive.training_samples, naive.reference_samples) == (6 * 16 + 3 * 16 * 2, 0)
    # The general rows are put through a forward pass, in each stage; what is left is 5 steps of 16
    # rows, then 2 of 16 pairs.
    (rows,) = {len(_lines(path)) for path in out.glob("world-3*/**/general-80.jsonl")}
    assert (ours.training_samples, ours.reference_samples) == (5 * 16 + 2 * 32, 2 * rows)
    assert costs["merge 0.5", "sft+dpo"] == naive


def test_a_second_call_keeps_what_is_finished(demonstration):
    out, first = demonstration
    before = {path: path.stat().st_mtime_ns for path in out.glob("world-*/*/*/checkpoints/*")}
    again = demonstrate(out)
    assert before
    assert {p: p.stat().st_mtime_ns for p in out.glob("world-*/*/*/checkpoints/*")} == before
    for name in ("records", "curves", "answers", "comparisons"):
        assert again[name] == first[name]


def test_each_run_is_what_its_configuration_says(demonstration):
    out, _ = demonstration
    configs = sorted(out.glob("world-*/configs/*-sft-*.yaml"))
    assert configs
    for path in configs:
        asked = load_config(path)
        assert load_config(f"{asked.output_dir}/config.yaml") == asked


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(demonstration):
    out, results = demonstration
    page = (out / "report.html").read_text()
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert page.count('src="data:image/png;base64,') == 2  # the figure, and the curves
    for absent in ("http://", "https://", "<script"):
        assert absent not in page
    assert results["comparisons"][0]["findings"]
    for comparison in results["comparisons"]:
        assert comparison["title"] in page
        for finding in comparison["findings"]:
            assert escape(finding["claim"]) in page
    assert "<th>exact safety</th>" in page
    assert "<th>safety</th>" not in page
    for text in results["answers"]["given"]["naive"]:
        assert escape(text) in page


def test_answers_are_those_to_the_prompts_in_their_order(trained, tmp_path):
    world, folder = trained
    evaluate(folder.model, folder.answers, tmp_path, options=ONE_DEVICE, progress=False)
    asked = [line["prompt"] for line in _lines(Path(folder.data("shown")))]
    lines = {line["prompt"]: line["answer"] for line in _lines(tmp_path / "items.jsonl")}
    assert read_answers(tmp_path) == [lines[prompt] for prompt in asked]
    assert len(asked) == 6 + len(world.general)


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


_ALL = [
    (regime, method, objective)
    for regime, settings in SETTINGS.items()
    for method in settings
    for objective in SEQUENCES
]


@pytest.mark.parametrize(("regime", "method", "objective"), _ALL)
def test_every_configuration_spends_what_the_stage_has(regime, method, objective, tmp_path):
    raw = configuration(method, regime, Folder(tmp_path), 0, objective)
    config = RunConfig.model_validate(raw)
    steps, pair = config.train.steps, 2 if objective == "dpo" else 1
    in_step_rows = config.reference_rows
    pairs = config.references.loss == "dpo"
    step = (BATCH - in_step_rows) * pair + in_step_rows * (2 if pairs else 1)
    spent = steps * step
    if config.references.rows_per_refresh:
        spent += -(-steps // config.ogpsa.refresh.every) * config.references.rows_per_refresh
    forward = (config.ogpsa.subspace == "inputs") + (config.references.target == "initial")
    spent += forward * regime.rows / 3
    more = step + (config.references.rows_per_refresh or 0)
    assert SEQUENCES[objective] - more < spent <= SEQUENCES[objective]


def test_every_comparison_has_settings_for_its_methods_and_shows_what_replay_does():
    for recipe in RECIPES.values():
        for comparison in recipe.comparisons:
            assert set(comparison.methods) <= SETTINGS[comparison.regime].keys()
            assert {"naive", "replay", "recommended"} <= set(comparison.methods)
        for name, method in METHODS.items():
            told = {
                SETTINGS[comparison.regime][name]
                for comparison in recipe.comparisons
                if name in comparison.methods and not method.uses_rows
            }
            assert len(told) <= 1  # they are one row of every table


def _record(method, stage, general, over_refusal=0.0, seed=0):
    scores = {
        "general": general,
        SAFETY: 0.99,
        OVER_REFUSAL: over_refusal,
        COMPLIANCE: 1 - over_refusal,
    }
    named = METHODS.get(method)
    label, kind = (named.label, named.kind) if named else (method, method)
    return ScoreRecord(label=label, method=kind, stage=stage, seed=seed, scores=scores)


def test_findings_say_where_the_method_does_not_win():
    records = [_record("base", "base", 0.9), _record("naive", "sft", 0.5)]
    for seed, off in enumerate((-0.04, 0.0, 0.04)):  # what the worlds differ in
        records.append(_record("recommended", "sft", 0.86 + off, 0.06 + off / 2, seed))
        records.append(_record("mixing", "sft", 0.865 + off, 0.05, seed))
        records.append(_record("replay", "sft", 0.85 + off * 0.9, 0.09, seed))
    found = {finding.claim: finding for finding in findings(records)}
    assert all(finding.stage == "sft" for finding in found.values())
    ours, mixing, replay = (METHODS[name].label for name in ("recommended", "mixing", "replay"))
    removed = found[f"{ours} removes at least 85% of the naive run's general loss"]
    assert removed.holds
    assert removed.evidence == "90.0%"
    assert not found[f"{ours} keeps over-refusal under 5%"].holds
    assert found[
        f"{ours} is safe ({MATCHED_SAFETY:.0%} of harmful requests refused, or more)"
    ].holds
    general = found[f"{ours} is ahead of {mixing} in general"]
    assert not general.holds
    assert general.evidence.endswith("; difference -0.005")  # the same in every world
    compliance = found[f"{ours} is ahead of {mixing} in exact benign compliance"]
    assert not compliance.holds  # by less than what it varies by
    assert compliance.evidence.endswith("; difference -0.010 ± 0.020")
    assert found[f"{ours} is ahead of {replay} in general"].holds
    assert found[f"{ours} is ahead of {replay} in exact benign compliance"].holds


@pytest.mark.parametrize("general, holds", [(0.890, False), (0.895, True)])
def test_with_one_world_a_lead_is_held_against_the_standard_error(general, holds):
    ours, mixing = (
        _record(method, "sft", score).model_copy(update={"spread": {"general": error}})
        for method, score, error in (
            ("recommended", general, 0.01),
            ("mixing", 0.87, 0.02),  # of the difference: 0.022
        )
    )
    (found,) = [each for each in findings([ours, mixing]) if each.claim.endswith("in general")]
    assert found.holds is holds


def test_methods_of_different_worlds_are_not_compared():
    records = [
        _record(method, "sft", 0.8, seed=seed)
        for method, seeds in (("recommended", (0, 1)), ("mixing", (0, 2)))
        for seed in seeds
    ]
    assert not [finding for finding in findings(records) if "mixing" in finding.claim]


def test_refusals_are_told_from_other_answers_by_their_beginning():
    assert REFUSAL.startswith(BEGINNING)
    assert BEGINNING == "no,"
