import json

import pytest
import yaml

from ogpsa_jax.errors import InputError
from ogpsa_jax.reporting.model_card import model_card, write_model_card


@pytest.fixture
def stage(tmp_path, write_run):
    """Writes one of two finished stages; keys of sections and of the summary may be changed."""

    def write(name, changes=(), summary=()):
        base = "someone/base-7b" if name == "first" else str(tmp_path / "first" / "export")
        objective = "sft" if name == "first" else "dpo"
        keys = {
            "objective": objective,
            "model": {"path": base},
            "data": {
                "train": [{"path": f"/home/me/{objective}.jsonl", "split": "train[:90]"}],
                "max_length": 2048,
            },
            "references": {"sets": [{"path": "org/general", "samples": 200}], "loss": "response"},
            "ogpsa": {"preset": "paper", "refresh": {"every": 30}},
            "optimizer": {"learning_rate": 1e-6},
            "dpo": {"beta": 0.2},
            "train": {"epochs": 3, "batch_size": 128},
            "seed": 7,
        }
        for section, changed in dict(changes).items():
            keys[section] = keys[section] | changed if isinstance(changed, dict) else changed
        figures = {
            "training_samples": 5248,
            "reference_samples": 800,
            "seconds": 12.5,
            "before": {"safety/loss": 2.5},
            "after": {"safety/loss": 1.25},
            "projection": {
                "refreshes": 2,
                "refused_refreshes": None,
                "effective_rank": 2.0,
                "mean_removed_fraction": 0.0123,
                "reference_coverage": None,
                "least_coverage": None,
            },
            "warnings": ["the basis was empty in some steps"],
        }
        write_run(tmp_path / name, summary=figures | dict(summary), **keys)

    return write


@pytest.fixture
def run(stage, tmp_path):
    """A pipeline of two finished stages with an evaluation of the second."""
    for name in ("first", "second"):
        stage(name)
        (tmp_path / name / "export").mkdir()
    scored = tmp_path / "second" / "evaluation" / "public"
    scored.mkdir(parents=True)
    task = {"kind": "refusal", "value": 0.875, "interval": [0.8, 0.93], "items": 100}
    results = {"suite": "public", "tasks": {"harmful": task}, "records": []}
    (scored / "results.json").write_text(json.dumps(results))
    return tmp_path / "second"


def test_the_card_holds_what_the_runs_files_say(run):
    card = model_card(run)
    assert "`someone/base-7b` after safety fine-tuning (SFT → DPO)" in card
    assert "| public | harmful | refusal | 100 | 0.875 | 0.8 – 0.93 |" in card
    assert "| dpo | safety/loss | 2.5 | 1.25 |" in card
    assert "| sft | references | org/general | 200 |" in card
    assert "| dpo | projection, mean removed fraction | 0.0123 |" in card
    assert "| optimizer.learning_rate | 1e-06 |" in card
    assert card.count("| dpo.beta | 0.2 |") == 1  # of the stage it belongs to
    assert "Warning (sft): the basis was empty in some steps" in card
    assert "Warning (dpo): the basis was empty in some steps" in card
    assert card.count("| seed | 7 |") == 2


def test_stages_of_one_objective_are_numbered(run, stage):
    stage("second", {"objective": "sft"})
    card = model_card(run)
    for i in (1, 2):
        assert f"| {i}. sft | safety/loss | 2.5 | 1.25 |" in card
        assert f"### {i}. sft" in card
        assert f"Warning ({i}. sft): " in card


def test_the_introduction_says_what_was_projected(run, stage):
    gradients = "in the span of a few gradients"
    assert gradients in model_card(run)
    stage("second", {"ogpsa": {"preset": "recommended", "refresh": None}})
    card = model_card(run)
    assert gradients not in card
    assert "projected off the inputs of layers" in card
    stage("second", {"ogpsa": {"preset": "off"}})
    card = model_card(run)
    assert "without gradient projection. Made with ogpsa_jax." in card


def test_the_card_says_that_references_were_trained_on_where_they_were(run, stage):
    assert "trained on the" not in model_card(run)
    stage("first", {"data": {"train": [{"path": "org/general"}]}})
    in_step = {"share": 0.25, "replay_weight": 0.5}
    changes = {"ogpsa": {"preset": "in-step", "refresh": None}, "references": {"in_step": in_step}}
    stage("second", changes)
    card = " ".join(model_card(run).split())
    assert "In the stage sft, rows of the reference sets were among the training data." in card
    assert (
        "In the stage dpo, the model was also trained on the answers of the reference rows: 32 of "
        "the 128 rows of every step, with weight 0.5."
    ) in card
    in_step["replay_weight"] = 0.0
    stage("second", changes)
    assert "In the stage dpo, the model was also trained" not in model_card(run)


def test_settings_that_had_no_part_in_the_run_are_left_out(run, stage):
    stage("second", {"data": {"packing": True}})
    card = model_card(run)
    assert "| train.epochs | 3.0 |" in card
    assert '| ogpsa.refresh | {"every": 30} |' in card
    assert "data.packing" not in card.partition("### dpo")[2]  # the stage is of pairs
    in_step = {"share": 0.5, "window": None, "replay_weight": 0.0}
    stage(
        "second",
        {
            "data": {"packing": True},
            "train": {"steps": 41},
            "references": {"in_step": in_step, "batch_size": 8},
            "ogpsa": {"refresh": None},
        },
    )
    second = model_card(run).partition("### dpo")[2]
    assert "| train.steps | 41 |" in second
    assert '| references.in_step | {"share": 0.5, "replay_weight": 0.0} |' in second
    for name in ("train.epochs", "ogpsa.refresh", "references.batch_size"):
        assert name not in second


def test_the_head_of_the_card_is_what_the_hub_reads(run):
    head = yaml.safe_load(model_card(run).split("---")[1])
    assert head["base_model"] == "someone/base-7b"
    assert head["library_name"] == "transformers"


def test_no_path_of_this_machine_is_published(run, tmp_path):
    card = model_card(run)
    assert "/home/me" not in card
    assert str(tmp_path) not in card
    assert "sft.jsonl" in card


def test_the_card_goes_beside_the_weights(run, tmp_path):
    assert write_model_card(run).read_text() == model_card(run)
    assert write_model_card(run) == run / "export" / "README.md"
    (tmp_path / "elsewhere").mkdir()
    assert write_model_card(run, tmp_path / "elsewhere").parent == tmp_path / "elsewhere"
    with pytest.raises(InputError, match="export the model first"):
        write_model_card(run, tmp_path / "absent")


def test_a_run_without_its_files_is_told(run, tmp_path):
    with pytest.raises(InputError, match="directory of a finished run"):
        model_card(tmp_path)
    (run / "evaluation" / "public" / "results.json").write_text("{}")
    with pytest.raises(InputError, match="evaluate the run again"):
        model_card(run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "speed": 3}))
    with pytest.raises(InputError, match=r"summary.json: unknown key 'speed'.* Another version"):
        model_card(run)
    (run / "summary.json").write_text("{")
    with pytest.raises(InputError, match=r"summary.json: cannot be read"):
        model_card(run)
