"""Bad input through the command line: one clear sentence, exit code 2, before any step."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from ogpsa_jax import cli
from ogpsa_jax.config.origin import location_of
from ogpsa_jax.files import only_writer
from ogpsa_jax.training import loop

Refused = Callable[..., str]


@pytest.fixture
def refused(ground, tmp_path, monkeypatch, capsys) -> Refused:
    """``refused(*overrides)`` -> the sentence."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a step was compiled")

    def refuse(
        *overrides: str, output_dir: Path = tmp_path / "run", configs: Sequence[Path] = ()
    ) -> str:
        monkeypatch.setattr(loop, "make_train_step", never)
        files = [*map(str, configs)] or [str(ground / "run.yaml"), f"output_dir={output_dir}"]
        code = cli.main(["train", *files, *overrides])
        said = capsys.readouterr().err.strip().splitlines()
        assert code == 2
        assert said[-1].startswith("ogpsa-jax: ")
        assert said[-1].endswith((".", "?"))
        assert not [line for line in said if "Traceback" in line]
        assert not (tmp_path / "run").exists()
        return said[-1]

    return refuse


@pytest.fixture
def model(ground, tmp_path) -> Path:
    """A copy of the model, to be spoilt."""
    return Path(shutil.copytree(ground / "model", tmp_path / "model"))


def rewrite(model: Path, **changes: object) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


@pytest.mark.parametrize(
    "override, parts",
    [
        ("model.path=nowhere/at/all", ["nowhere/at/all", "not a folder"]),
        ("data.train=[{path: nowhere.jsonl}]", ["nowhere.jsonl"]),
        ("data.train=[]", ["data.train is empty"]),
        ("data.train=[{path: ''}]", ["data.train", "path", "at least 1 character"]),
        ("data.train.0.weight=1e-9", ["data.train", "weight", "0.000001"]),
        ("train={steps: null, epochs: 1.0e-9}", ["train.epochs", "no row at all"]),
        ("train={steps: null, epochs: 1e12}", ["train.epochs", "more than the 2147483647 that"]),
        ("train={steps: null, epochs: 1e300}", ["train.epochs", "more than the 2147483647 that"]),
        ("train.steps=10000000000", ["train.steps", "less than 2147483648"]),
        ("data.templat=x", ["unknown key 'data.templat'", "did you mean 'template'?"]),
        ("references.sets.0.samples=25", ["general.jsonl", "25 samples asked for", "24"]),
        ("data.max_length=4", ["line 1", "nothing is left to learn", "data.max_length"]),
        ("data.max_length=1000000", ["max_position_embeddings"]),
        ("data.template=nowhere.jinja", ["nowhere.jinja"]),
        ("train.batch_size=6", ["train.batch_size", "8 row shards", "set train.batch_size=8"]),
        ("mesh.fsdp=3", ["3", "does not make the 8 devices"]),
        ("mesh.tensor=16", ["does not make the 8 devices"]),
        ("mesh.context=3", ["mesh.context: 3 does not divide data.max_length"]),
        ("output_dir=' '", ["output_dir", "not ' '"]),
        ("model.dtype=float16", ["model.dtype", "a CPU does not compute in float16"]),
        ("model.lora={rank: 100000}", ["model.lora.rank", "exceeds the model's width, 64"]),
        ("optimizer.warmup_steps=100000000000", ["warmup_steps", "less than 2147483648"]),
        ("output_dir=/dev/null/run", ["output_dir", "/dev/null is a file"]),
        ("output_dir=/proc/run", ["output_dir", "cannot be"]),
    ],
)
def test_a_bad_setting_is_told(refused, override, parts):
    sentence = refused(override)
    assert all(part in sentence for part in parts), sentence


_PAIRS = {
    "objective": "dpo",
    "data.train.0.path": "{ground}/pairs.jsonl",
    "references.sets.0.path": "{ground}/general.jsonl",
    "references.loss": "response",
    "train.batch_size": 16,
}


@pytest.mark.parametrize(
    "changes, key, line",
    [
        ({"model.path": "nowhere/at/all"}, "model.path", "path: nowhere/at/all"),
        ({"model.tokenizer": "nowhere/at/all"}, "model.tokenizer", "tokenizer: nowhere/at/all"),
        ({"model.dtype": "float16"}, "model.dtype", "dtype: float16"),
        ({"model.lora": {"rank": 999}}, "model.lora.rank", "rank: 999"),
        ({"model.lora": {"adapter": "no/such"}}, "model.lora.adapter", "adapter: no/such"),
        ({"data.train": []}, "data.train", "train: []"),
        ({"data.train.0.path": "nowhere.jsonl"}, "data.train.0", "path: nowhere.jsonl"),
        (
            {"data.train.0.format": "none", "data.train.0.path": "{ground}/pairs.jsonl"},
            "data.train.0",
            "- format: none",
        ),
        ({"data.train.1": {"path": "no/such.csv"}}, "data.train.1", "path: no/such.csv"),
        ({"data.eval.general.path": "nowhere.jsonl"}, "data.eval.general", "general:"),
        ({"data.template": "nowhere.jinja"}, "data.template", "template: nowhere.jinja"),
        ({"data.max_length": 10**6}, "data.max_length", "max_length: 1000000"),
        ({"references.sets.0.path": "no/such.json"}, "references.sets.0", "path: no/such.json"),
        (
            {"references.in_step": {"share": 0.01}, "ogpsa.refresh": None},
            "references.in_step.share",
            "share: 0.01",
        ),
        ({"train.batch_size": 6}, "train.batch_size", "batch_size: 6"),
        ({"train.epochs": 1e12, "train.steps": None}, "train.epochs", "epochs: 1000000000000.0"),
        ({"mesh": {"fsdp": 3}}, "mesh", "mesh:"),
        ({"output_dir": "/dev/null/run"}, "output_dir", "output_dir: /dev/null/run"),
        (
            {**_PAIRS, "dpo.reference_model": "no/such"},
            "dpo.reference_model",
            "reference_model: no/such",
        ),
        ({**_PAIRS, "references.loss": "dpo"}, "references.sets.0", "general.jsonl"),
    ],
)
def test_a_bad_setting_is_told_with_the_file_the_line_and_the_key(
    refused, ground, tmp_path, changes, key, line
):
    """Also where what is wrong is met long after the configuration was read."""
    raw = yaml.safe_load((ground / "run.yaml").read_text())
    raw["output_dir"] = str(tmp_path / "run")
    for name, value in changes.items():
        value = value.format(ground=ground) if isinstance(value, str) else value
        *sections, last = location_of(name)
        at = raw
        for part in sections:
            at = at[part] if isinstance(at, list) else at.setdefault(part, {})
        if isinstance(at, list):
            at.append(value)
        else:
            at[last] = value
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    lines = path.read_text().splitlines()
    number = max(i for i, text in enumerate(lines, start=1) if line in text)
    sentence = refused(configs=[path])
    assert sentence.startswith(f"ogpsa-jax: {path}, line {number}: {key}"), sentence


def test_a_bad_setting_of_the_command_line_is_told_with_its_override(refused):
    sentence = refused("data.train.0.path=nowhere.jsonl")
    assert sentence.startswith(
        "ogpsa-jax: override 'data.train.0.path=nowhere.jsonl': data.train.0: nowhere.jsonl: "
    )


def test_bad_data_of_a_later_stage_is_told_before_the_first_one_trains(refused, ground, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text(
        f"{{data: {{train: [{{path: {tmp_path / 'nowhere.jsonl'}}}], max_length: 128}}, "
        f"ogpsa: {{preset: off}}, optimizer: {{learning_rate: 1e-3}}, "
        f"output_dir: {tmp_path / 'second'}}}\n"
    )
    # The stage's own file names its directory; an override would name it for both.
    first = tmp_path / "first.yaml"
    first.write_text(
        (ground / "run.yaml").read_text().replace(str(ground / "never"), str(tmp_path / "run"))
    )
    assert f"{second}, line 1: data.train.0: " in refused(configs=[first, second])


def test_a_missing_configuration_is_told(capsys):
    assert cli.main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: cannot read the configuration" in capsys.readouterr().err


def test_a_malformed_row_is_told_with_file_and_line(refused, ground, tmp_path):
    rows = (ground / "safety.jsonl").read_text().splitlines()
    rows[6] = json.dumps({"prompt": "what"})
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    sentence = refused(f"data.train.0.path={tmp_path / 'bad.jsonl'}")
    assert "bad.jsonl, line 7: " in sentence
    assert "must be text, found nothing" in sentence
    rows[6] = '{"prompt": '
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    assert "line 7" in refused(f"data.train.0.path={tmp_path / 'bad.jsonl'}")


def test_a_template_without_assistant_tokens_is_told(refused, tmp_path):
    template = tmp_path / "silent.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert "does not show what the assistant says" in refused(f"data.template={template}")


@pytest.mark.parametrize("failing", ["1 / 0", "[].pop()", "raise_exception('no')", "nothing.at"])
def test_a_template_that_fails_is_told(refused, tmp_path, failing):
    template = tmp_path / "failing.jinja"
    template.write_text("{{ " + failing + " }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert "cannot render the conversation" in refused(f"data.template={template}")


@pytest.mark.parametrize("value", ["2020-99-99", "[" * 5000, "{a: b: c}"])
def test_a_value_that_is_no_yaml_is_told(refused, ground, tmp_path, value):
    assert "is not valid YAML" in refused(f"name={value}")
    config = tmp_path / "bad.yaml"
    config.write_text((ground / "run.yaml").read_text() + f"\nseed: {value}\n")
    assert "bad.yaml" in refused(configs=[config])


def test_a_checkpoint_that_lacks_a_tensor_is_told(refused, model):
    rewrite(model, **{"model.norm.weight": None})
    sentence = refused(f"model.path={model}")
    assert "tensor model.norm.weight is missing" in sentence


def test_a_checkpoint_with_an_unknown_tensor_is_told(refused, model):
    norm = load_file(model / "model.safetensors")["model.norm.weight"]
    rewrite(model, **{"model.extra.weight": norm})
    assert "model.extra.weight is not part of" in refused(f"model.path={model}")


def test_a_checkpoint_with_a_tensor_of_another_shape_is_told(refused, model):
    norm = load_file(model / "model.safetensors")["model.norm.weight"]
    rewrite(model, **{"model.norm.weight": norm[:-1].copy()})
    sentence = refused(f"model.path={model}")
    assert "model.norm.weight has shape [63]" in sentence
    assert "[64]" in sentence


def test_a_torn_checkpoint_is_told(refused, model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(f"model.path={model}")


def test_the_directory_of_another_run_is_refused(refused, interrupted):
    sentence = refused("mesh.fsdp=8", "seed=1", output_dir=interrupted)
    assert "seed: 0, not 1" in sentence
    (interrupted / "config.yaml").unlink()
    assert "no config.yaml" in refused("mesh.fsdp=8", output_dir=interrupted)


@pytest.mark.parametrize("name", ["safety.jsonl", "general.jsonl", "model/model.safetensors"])
def test_what_changed_while_a_run_was_stopped_is_told(refused, ground, interrupted, name):
    path, key = ground / name, {"s": "data.train", "g": "references.sets.0", "m": "model.path"}
    before = path.read_bytes()
    try:
        if name.endswith(".jsonl"):
            path.write_bytes(before + b'{"prompt": "new", "completion": "row"}\n')
        else:
            norm = load_file(path)["model.norm.weight"]
            rewrite(path.parent, **{"model.norm.weight": norm + 1})
        sentence = refused("mesh.fsdp=8", output_dir=interrupted)
    finally:
        path.write_bytes(before)
    assert f"inputs.json: what {key[name[0]]} names has changed since this run began" in sentence


def test_results_at_an_address_are_refused(refused):
    sentence = refused(output_dir="gs://bucket/run")
    assert "output_dir: gs://bucket/run is an address" in sentence


def test_a_directory_in_which_another_process_trains_is_refused(refused, interrupted):
    with only_writer(interrupted):
        sentence = refused("mesh.fsdp=8", output_dir=interrupted)
    assert "another process is writing there" in sentence


def test_a_finished_run_without_its_export_says_how_to_make_it(refused, interrupted, uninterrupted):
    shutil.copy(uninterrupted / "summary.json", interrupted)
    assert "its export is gone; `ogpsa-jax export" in refused("mesh.fsdp=8", output_dir=interrupted)


def test_a_torn_summary_is_told(refused, interrupted):
    (interrupted / "summary.json").write_text('{"name": ')
    sentence = refused("mesh.fsdp=8", output_dir=interrupted)
    assert "summary.json: cannot be read" in sentence
    assert "delete it, and the training command of this run writes it again" in sentence


def test_a_summary_of_another_version_is_told(refused, interrupted):
    (interrupted / "summary.json").write_text("{}")
    sentence = refused("mesh.fsdp=8", output_dir=interrupted)
    assert "summary.json: 'name' is missing" in sentence
    assert "Another version of ogpsa_jax may have written it: delete it" in sentence


def test_a_finished_run_is_left_as_it_is(uninterrupted, ground, capsys, caplog):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}
    with caplog.at_level("INFO", "ogpsa_jax"):
        assert cli.main(["train", str(ground / "run.yaml"), f"output_dir={uninterrupted}"]) == 0
    assert "is finished and was not changed; delete it to run it again" in caplog.text
    assert "8 steps" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file()}
