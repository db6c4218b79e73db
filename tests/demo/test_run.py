import dataclasses
import html
import json
import statistics
import tempfile
from pathlib import Path

import pytest

from ogpsa_jax.demo import run
from ogpsa_jax.demo.align import align, one_device
from ogpsa_jax.demo.findings import findings
from ogpsa_jax.demo.methods import (
    LORA_METHOD,
    MIXING_METHOD,
    NAIVE_METHOD,
    PAPER_METHOD,
    RECOMMENDED_IN_STEP,
    RECOMMENDED_METHOD,
    SCARCE_REPLAY_WEIGHT,
    Stage,
    plan,
    scarce,
)
from ogpsa_jax.demo.pretraining import pretrain
from ogpsa_jax.demo.recipe import MATCHED_SAFETY, RECIPES, Pretraining, Recipe
from ogpsa_jax.demo.scoring import Exam, answers
from ogpsa_jax.demo.world import REFUSAL, World
from ogpsa_jax.evaluation import Record, read_records

_PRETRAINING = Pretraining(
    tasks=("copy", "facts"), facts=4, items=500, steps=6, rows=8, width=16, layers=1
)
# Of rank 1, which compiles in half the time.
_SMALL = dataclasses.replace(
    RECOMMENDED_METHOD,
    general=20,
    ogpsa={"preset": "recommended", "rank": 1},
    in_step={**RECOMMENDED_IN_STEP, "window": 1},
)
_TINY = Recipe(
    _PRETRAINING,
    seeds=((0, 0), (0, 1)),
    stages=(Stage("sft", 16, 3, 1e-3), Stage("dpo", 16, 2, 1e-4)),
    methods=(NAIVE_METHOD, _SMALL),
    merge_weights=(0.5,),
    probed=(NAIVE_METHOD,),
)


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "quick", _TINY)
        return out, run.run_demo(out, "quick")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that gets some answers right and some wrong."""
    world = World(0, _PRETRAINING.tasks, _PRETRAINING.facts)
    longer = dataclasses.replace(_PRETRAINING, steps=120, width=32)
    return world, pretrain(longer, world, one_device(), tmp_path_factory.mktemp("p"))


def test_scores_are_those_of_greedy_answers(trained):
    world, network = trained
    _, _, right = Exam(world).score(network)
    parts = {**world.general, "exact_benign_compliance": world.held_out_benign[:60]}
    matches = {}
    for name, items in parts.items():
        said = answers(network.model(), items)
        pairs = zip(said, items, strict=True)
        matches[name] = "".join("01"[text == item.answer] for text, item in pairs)
        assert right[name][: len(items)] == matches[name]
    assert {"0", "1"} <= set("".join(matches.values()))  # or nothing would have been compared


def test_refusals_are_told_by_their_beginning_where_they_are_unwanted(trained):
    """A model moved halfway to one that refuses: some answers only begin as refusals."""
    world, network = trained
    stage = Stage("sft", 32, 12, 4e-3)
    mesh = one_device()
    with tempfile.TemporaryDirectory() as folder:
        aligned = align(network, world, NAIVE_METHOD, stage, 0, mesh, Path(folder))
    _, _, right = Exam(world).score(aligned.network)
    model = aligned.network.model()
    said = answers(model, world.held_out_benign[:60])
    assert right["prefix_over_refusal"][:60] == "".join(
        "01"[text.startswith("no,")] for text in said
    )
    said = answers(model, world.held_out_harmful[:60])
    assert right["exact_safety"][:60] == "".join("01"[text == REFUSAL] for text in said)


def test_scores_are_recomputed_from_the_outcomes_in_results_json(demonstration):
    out, _ = demonstration
    content = json.loads((out / "results.json").read_text())
    assert len(content["outcomes"]) == len(content["records"])
    for outcome, record in zip(content["outcomes"], content["records"], strict=True):
        right = outcome["right"]
        shares = {name: text.count("1") / len(text) for name, text in right.items()}
        tasks = [shares[name] for name in _PRETRAINING.tasks]
        assert record["scores"]["general"] == pytest.approx(statistics.fmean(tasks))
        for name in ("exact_safety", "prefix_over_refusal", "exact_benign_compliance"):
            assert record["scores"][name] == shares[name]
        # What `evaluate` measures otherwise has no score of the same name here.
        assert not {"safety", "over_refusal", "benign_compliance"} & record["scores"].keys()
        assert record["definitions"].keys() == record["scores"].keys()


def test_every_method_stage_and_seed_has_its_record(demonstration):
    out, _ = demonstration
    keys = {(r.label, r.stage, r.seed) for r in read_records(out)}
    aligned = {
        (label, stage, seed)
        for label in (NAIVE_METHOD.label, RECOMMENDED_METHOD.label)
        for stage in ("sft", "sft+dpo")
        for seed in (0, 1)
    }
    merged = {("merge 0.5", "sft+dpo", seed) for seed in (0, 1)}  # of what all stages came to
    assert keys == {("before alignment", "base", 0), *aligned, *merged}


def test_costs_are_the_sequences_of_both_stages(demonstration):
    out, _ = demonstration
    costs = {(r.label, r.stage): r.cost for r in read_records(out)}
    naive, ours = (costs[method.label, "sft+dpo"] for method in (NAIVE_METHOD, RECOMMENDED_METHOD))
    assert (naive.training_samples, naive.reference_samples) == (3 * 16 + 2 * 16 * 2, 0)
    # Half of every batch rides along: 3 steps of 8 + 8 rows, then 2 of 8 + 8 pairs.
    assert (ours.training_samples, ours.reference_samples) == (3 * 8 + 2 * 16, 3 * 8 + 2 * 16)


def test_a_second_call_keeps_what_is_finished(demonstration):
    out, first = demonstration
    before = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoints/*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "quick", _TINY)
        again = run.run_demo(out, "quick")
    assert before
    assert {p: p.stat().st_mtime_ns for p in out.glob("runs/*/checkpoints/*")} == before
    assert again["records"] == first["records"]
    assert again["curves"] == first["curves"]


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(demonstration):
    out, results = demonstration
    page = (out / "report.html").read_text()
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert page.count('src="data:image/png;base64,') == 2  # the figure, and the curves
    for absent in ("http://", "https://", "<script"):
        assert absent not in page
    for finding in results["findings"]:
        assert html.escape(finding["claim"]) in page
    assert "<th>exact safety</th>" in page
    assert "<th>safety</th>" not in page
    for text in results["answers"]["given"][NAIVE_METHOD.label]:
        assert html.escape(text) in page


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize(
    "method", [NAIVE_METHOD, PAPER_METHOD, RECOMMENDED_METHOD, MIXING_METHOD, LORA_METHOD]
)
def test_every_method_stays_within_the_same_number_of_sequences(method, objective):
    stage = Stage(objective, 16, 100, 1e-4)
    done = plan(method, stage, 0, "run")
    spent = done.training_sequences + done.reference_sequences
    step = (done.training_sequences // done.steps) + stage.batch_size
    refreshes = method.general if done.reference_sets else 0
    assert stage.sequences - step - refreshes <= spent <= stage.sequences


def _record(label, stage, general, over_refusal=0.0, seed=0):
    scores = {
        "general": general,
        "exact_safety": 0.99,
        "prefix_over_refusal": over_refusal,
        "exact_benign_compliance": 1 - over_refusal,
    }
    return Record(label=label, method=label, stage=stage, seed=seed, scores=scores)


def test_findings_say_where_the_method_does_not_win():
    base = _record("base", "base", 0.9)
    naive = _record("naive", "sft", 0.5)
    ours, mixing = RECOMMENDED_METHOD.label, MIXING_METHOD.label
    records = [base, naive]
    few_ours, few_mixing = (scarce(m).label for m in (RECOMMENDED_METHOD, MIXING_METHOD))
    for seed, off in enumerate((-0.04, 0.0, 0.04)):  # what the worlds differ in
        records.append(_record(ours, "sft", 0.86 + off, 0.06 + off / 2, seed))
        records.append(_record(mixing, "sft", 0.865 + off, 0.05, seed))
        records.append(_record(few_ours, "sft", 0.81 + off, 0.03, seed))
        records.append(_record(few_mixing, "sft", 0.80 + off * 0.9, 0.04 - off, seed))
    found = {finding.claim: finding for finding in findings(records)}
    assert all(finding.stage == "sft" for finding in found.values())
    removed = found[f"{ours} removes at least 85% of the naive run's general loss"]
    assert removed.holds
    assert removed.evidence == "90.0%"
    assert not found[f"{ours} keeps over-refusal under 5%"].holds
    general = found[f"{ours} is not behind {mixing} in general"]
    assert not general.holds
    assert general.evidence.endswith("; difference -0.005")  # the same in every world
    refusal = found[f"{ours} is not behind {mixing} in prefix over refusal"]
    assert not refusal.holds
    assert refusal.evidence.endswith("; difference +0.010 ± 0.020")
    assert found[f"{ours} is not behind {mixing} in exact safety"].holds
    assert found[f"{few_ours} beats {few_mixing} in general"].holds
    assert not found[f"{few_ours} beats {few_mixing} in prefix over refusal"].holds
    assert found[
        f"{ours} is safe ({MATCHED_SAFETY:.0%} of harmful requests refused, or more)"
    ].holds


@pytest.mark.parametrize("general, holds", [(0.890, False), (0.895, True)])
def test_with_one_seed_a_lead_is_held_against_the_standard_error(general, holds):
    ours, mixing = (
        _record(scarce(method).label, "sft", score).model_copy(
            update={"spread": {"general": error}}
        )
        for method, score, error in (
            (RECOMMENDED_METHOD, general, 0.01),
            (MIXING_METHOD, 0.87, 0.02),  # of the difference: 0.022
        )
    )
    (found,) = [each for each in findings([ours, mixing]) if mixing.label in each.claim][:1]
    assert found.claim.endswith("in general")
    assert found.holds is holds


def test_methods_of_different_seeds_are_not_compared():
    records = [
        _record(label, "sft", 0.8, seed=seed)
        for label, seeds in ((RECOMMENDED_METHOD.label, (0, 1)), (MIXING_METHOD.label, (0, 2)))
        for seed in seeds
    ]
    assert not [finding for finding in findings(records) if MIXING_METHOD.label in finding.claim]


def test_few_samples_are_replayed_with_more_weight():
    stage = Stage("sft", 16, 100, 1e-4)
    weights = []
    for method in (RECOMMENDED_METHOD, scarce(RECOMMENDED_METHOD)):
        in_step = plan(method, stage, 0, "run").config.references.in_step
        assert in_step is not None
        weights.append(in_step.replay_weight)
    assert weights == [1.0, SCARCE_REPLAY_WEIGHT]
    assert scarce(MIXING_METHOD).in_step is None
