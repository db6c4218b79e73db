"""References without answers: which model is the initial one, and what it says, once for all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ogpsa_jax.config import load_config
from ogpsa_jax.errors import InputError
from ogpsa_jax.training import run
from ogpsa_jax.training.initial_model import find_initial_model
from ogpsa_jax.training.inputs import check_same_inputs
from ogpsa_jax.training.mesh import make_mesh
from ogpsa_jax.training.prepare import model_config, prepare_data, prepare_model
from ogpsa_jax.training.references import prepare_references

from .conftest import metrics
from .initial import IN_STEP, INITIAL, OWN, Asked, Configured, change_weights, with_prompts
from .test_mesh import assert_same_numbers
from .test_resume import assert_same_end

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def whole(
    configured: Configured, prompts: Path, on_some_devices: None, tmp_path: Path
) -> tuple[Path, tuple[str, ...]]:
    """A run on one device with prompts alone, and its settings."""
    settings = (INITIAL, *IN_STEP, with_prompts(prompts))
    run.train(configured(tmp_path / "whole", *settings))
    return tmp_path / "whole", settings


def test_a_run_with_prompts_alone_is_the_same_on_every_mesh_and_resumes_to_the_bit(
    whole: tuple[Path, tuple[str, ...]],
    configured: Configured,
    on_some_devices: None,
    cache: Path,
    tmp_path: Path,
) -> None:
    folder, settings = whole
    lines = [line for line in metrics(folder) if "loss" in line]
    assert lines[0]["reference/loss"] == 0.0  # nothing has changed yet
    assert lines[-1]["reference/loss"] > 1e-6
    assert lines[-1]["effective_rank"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["references"]["initial_model"] == str(configured(tmp_path).model.path)
    assert summary["data"]["references.0"]["prompts_alone"] == 12
    assert not [w for w in summary["warnings"] if "empty" in w]

    killed = tmp_path / "killed"
    shutil.copytree(folder, killed)
    shutil.rmtree(killed / "export")
    for name in ("summary.json", "curves.png"):
        (killed / name).unlink()
    for step in (6, 8):
        shutil.rmtree(killed / "checkpoints" / str(step))
    shutil.rmtree(cache)  # what was kept is gone: computed anew, it is the same
    run.train(configured(killed, *settings))
    assert_same_end(killed, folder)

    shutil.rmtree(cache)
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    run.train(configured(tmp_path / "sharded", *settings, *mesh))
    assert_same_numbers(tmp_path / "sharded", folder)


def test_a_pipeline_goes_back_to_the_model_that_it_began_with(
    ground: Path, configured: Configured, on_some_devices: None, tmp_path: Path
) -> None:
    """SFT, then DPO by a later command, from the first run's export."""
    begun, first, second = tmp_path / "begun", tmp_path / "sft", tmp_path / "dpo"
    shutil.copytree(ground / "model", begun)
    run.train(configured(first, f"model.path={begun}", "ogpsa.preset=off", "train.steps=2"))
    later = (
        *("objective=dpo", f"data.train=[{{path: {ground / 'pairs.jsonl'}}}]", "train.steps=2"),
        *(INITIAL, *IN_STEP, f"model.path={first / 'export'}", "references.top_k=9"),
    )
    config = configured(second, *later)
    found = find_initial_model(config)
    assert (found.name, found.own_start, found.problem) == (str(begun), False, "")
    summary = run.train(config)
    assert summary.references.initial_model == str(begun)
    # The first stage has changed the model, so there is something to bring back at once.
    assert metrics(second)[1]["reference/loss"] > 1e-6

    third = configured(tmp_path / "third", *later[:-2], f"model.path={second / 'export'}")
    assert find_initial_model(third).name == str(begun)
    named = configured(tmp_path / "fourth", *later, f"references.initial_model={second / 'export'}")
    assert find_initial_model(named).name == str(second / "export")

    change_weights(begun)
    changed = find_initial_model(config)
    assert changed.own_start
    assert "has changed since; name that one with references.initial_model" in changed.problem
    data = prepare_references(
        config,
        prepare_data(config, model_config(config)),
        make_mesh(config.mesh),
        lambda: prepare_model(config, make_mesh(config.mesh)),
    )
    assert data.warnings[0] == changed.problem
    with pytest.raises(InputError, match=r"what references.initial_model names has changed"):
        check_same_inputs(second, config, Asked().references(named))
    shutil.rmtree(begun)
    assert "is not found" in find_initial_model(config).problem


def test_refreshed_references_say_that_they_begin_with_nothing(
    configured: Configured, tmp_path: Path
) -> None:
    told = Asked().references(configured(tmp_path, INITIAL)).warnings
    assert any("nothing can be projected before the second refresh" in w for w in told)
    assert not Asked().references(configured(tmp_path, INITIAL, *IN_STEP)).warnings


REFUSED = {
    "references.loss=dpo": "references.target: initial cannot go with references.loss: dpo",
    "references.loss=official": "initial cannot go with references.loss: official",
    "references.top_k=0": "references.top_k",
    "references.target=teacher": "references.target",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_contradict_are_refused(setting: str, ground: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[setting]):
        load_config(ground / "run.yaml", ["objective=dpo", INITIAL, setting])
    with pytest.raises(InputError, match="own gives no pairs"):
        load_config(ground / "run.yaml", ["objective=dpo", OWN[0], "references.loss=dpo"])


@pytest.mark.parametrize("extra", [{}, {"completion": None}])
def test_prompts_without_answers_name_the_remedy(
    extra: dict[str, None], configured: Configured, tmp_path: Path
) -> None:
    path = tmp_path / "alone.jsonl"
    path.write_text(json.dumps({"prompt": "red green", **extra}) + "\n")
    config = configured(tmp_path, f"references.sets=[{{path: {path}}}]")
    remedy = "ogpsa.preset: recommended, references.target: initial or references.answers: own"
    with pytest.raises(InputError, match=remedy):
        prepare_data(config, model_config(config))
    rows = [{"prompt": "red", "completion": "blue"}, {"prompt": "green"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"line 2: .* must be text.*{remedy}\\."):
        prepare_data(config, model_config(config))
    both = configured(tmp_path, INITIAL, f"references.sets=[{{path: {path}}}]")
    data = prepare_data(both, model_config(both))
    assert data.reports["references.0"].prompts_alone == 1
    [answered], [alone] = (example.sequences for example in data.references[0])
    assert 0 < answered.loss_mask.sum() < len(answered.ids) - 1
    assert alone.loss_mask.tolist() == [False] + [True] * (len(alone.ids) - 1)


def other_vocabulary(folder: Path) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"vocab_size": raw["vocab_size"] + 1}))


def other_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    words = raw["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_vocabulary, "name a model with the same vocabulary"),
        (other_tokens, "the id of 'a' is .* name a model with the same tokenizer"),
        (shutil.rmtree, "not a folder"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused_before_anything_is_trained(
    change: Callable[[Path], None], told: str, ground: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(ground / "model", other)
    change(other)
    raw = yaml.safe_load((ground / "run.yaml").read_text())
    raw["references"] |= {"target": "initial", "initial_model": str(other)}
    paths = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    paths[0].write_text((ground / "run.yaml").read_text())
    paths[1].write_text(yaml.safe_dump(raw))
    places = [str(tmp_path / "one"), str(tmp_path / "two")]
    with pytest.raises(InputError, match=f"{other}.*{told}" if other.exists() else told):
        run.train_stages(paths, output_dirs=places)
    assert not (tmp_path / "one").exists()
