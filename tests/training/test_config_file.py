from pathlib import Path

import pytest
import yaml

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.file import dump_config, load_config, schema_lines
from ogpsa_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
objective: sft
model: {path: somewhere}
optimizer:
  learning_rate: 1e-4
references: {sets: [{path: refs.jsonl}]}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_exponents_without_a_point_are_numbers(good):
    assert load_config(good).optimizer.learning_rate == 1e-4


def test_off_is_a_preset_and_not_a_truth_value(good):
    good.write_text(GOOD + "ogpsa: {preset: off}\n")
    assert load_config(good).ogpsa.preset == "off"
    assert load_config(good, ["ogpsa.preset=off", "data.packing=false"]).data.packing is False


def test_a_resolved_configuration_round_trips(good, tmp_path):
    config = load_config(good, ["ogpsa.preset=paper", "objective=dpo"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    "override, parts",
    [
        ("optimizer.learning_rat=1", ["unknown key", "did you mean 'learning_rate'"]),
        ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "greater than 0", "-1"]),
        (
            "ogpsa.refresh_every=5",
            ["'ogpsa.refresh_every' is now written ogpsa.refresh: {every: N}"],
        ),
        (
            "ogpsa.refresh={every: 5, distance: 0.1}",
            ["one of every and distance, not both"],
        ),
        ("ogpsa.refresh={}", ["one of every and distance, not neither"]),
        ("ogpsa.refresh={distance: 0}", ["ogpsa.refresh.distance", "greater than 0"]),
        ("ogpsa.preset=papr", ["'in-step' or 'off'", "'papr'"]),
        ("references.sets=[]", ["references.sets is empty", "ogpsa.preset"]),
        ("mesh.fsdp=0", ["sizes must be positive"]),
        ("references.sets.0.samples=many", ["references.sets.0.samples", "integer"]),
        ("references.sets.7.samples=1", ["'7'", "list of 1"]),
        ("data.train=[{format: alpaca}]", ["data.train.0.path", "missing"]),
        ("seed", ["expected key.sub=value"]),
    ],
)
def test_a_wrong_override_is_told_in_one_sentence(good, override, parts):
    with pytest.raises(InputError) as raised:
        load_config(good, [override])
    sentence = str(raised.value)
    assert all(part in sentence for part in parts), sentence
    assert "\n" not in sentence


def test_an_unknown_key_is_told_with_file_and_line(good):
    good.write_text(GOOD.replace("learning_rate", "lerning_rate"))
    with pytest.raises(InputError, match=r"run\.yaml, line 4: .*did you mean 'learning_rate'"):
        load_config(good)


def test_broken_yaml_is_told_with_its_line(good):
    good.write_text(GOOD + "train: [\n")
    with pytest.raises(InputError, match=r"run\.yaml, line \d+:"):
        load_config(good)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot read"):
        load_config(tmp_path / "nowhere.yaml")


def test_environment_variables_are_replaced(good, monkeypatch, caplog):
    caplog.set_level("INFO", "ogpsa_jax")
    monkeypatch.setenv("SOME_FOLDER", "here")
    config = load_config(good, ["model.path=${SOME_FOLDER}/m", "output_dir=${UNSET_NAME:-there}"])
    assert caplog.messages == [f"{good}: UNSET_NAME is not set, so its default there is used"]
    assert (config.model.path, config.output_dir) == ("here/m", "there")
    with pytest.raises(InputError, match="UNSET_NAME is not set"):
        load_config(good, ["model.path=${UNSET_NAME}"])


def test_every_key_is_documented():
    lines = list(schema_lines(RunConfig))
    assert len(lines) > 50
    assert not [line for line in lines if line.endswith(("None", ": "))]


@pytest.mark.parametrize("section", ["", "optimizer: {schedule: linear}\n", "optimizer:\n"])
def test_the_learning_rate_has_no_default(good, section):
    good.write_text(GOOD.replace("optimizer:\n  learning_rate: 1e-4\n", section))
    with pytest.raises(InputError) as raised:
        load_config(good)
    sentence = str(raised.value)
    assert "'optimizer.learning_rate' is missing" in sentence
    assert all(part in sentence for part in ("1e-6", "smaller models", "docs/rates.md"))
    assert (ROOT / "docs/rates.md").exists()
    assert "\n" not in sentence
    assert load_config(good, ["optimizer.learning_rate=3e-5"]).optimizer.learning_rate == 3e-5


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_is_valid_and_sets_its_learning_rate(path):
    assert load_config(path).optimizer.learning_rate > 0
    assert yaml.safe_load(path.read_text())["optimizer"]["learning_rate"]
