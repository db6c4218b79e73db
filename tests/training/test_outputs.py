"""What a run leaves behind, and what it says when the projection does nothing."""

import datetime
import json
import math
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file
from tensorboardX.proto.event_pb2 import Event

from ogpsa_jax.config import load_config
from ogpsa_jax.config.sections import MeshSection
from ogpsa_jax.data import BUILT_IN, ChatTemplate, digest, load_tokenizer
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import save_lora
from ogpsa_jax.models.config import read_config
from ogpsa_jax.reporting.model_card import write_model_card
from ogpsa_jax.runs import TrainLoss
from ogpsa_jax.training import inputs, run
from ogpsa_jax.training.export import export
from ogpsa_jax.training.export_checkpoint import export_checkpoint
from ogpsa_jax.training.mesh import make_mesh
from ogpsa_jax.training.metrics import MetricsLog, draw_curves, find_problems, read_metrics
from ogpsa_jax.training.prepare import model_config, prepare_data, prepare_model
from ogpsa_jax.training.progress import RunProgress, progress_of
from ogpsa_jax.training.summary import judge_curve, summarise

from .conftest import STEPS, metrics


def scalars(run_dir: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> value of all TensorBoard files, in the order in which they were begun."""
    found = {}
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
            at += 16 + size
    return found


def test_metrics_hold_every_field_of_every_step(uninterrupted):
    fields = {
        *("step", "learning_rate", "loss", "weight", "grad_norm", "update_norm", "refreshed"),
        *("removed_fraction", "in_span_fraction", "effective_rank", "steps_since_refresh"),
        *("refreshes", "refused_refreshes"),
    }
    for line in metrics(uninterrupted):
        if "loss" in line:
            assert fields <= line.keys()
            assert all(math.isfinite(value) for value in line.values())


def test_tensorboard_holds_the_numbers_of_the_metrics(uninterrupted):
    found = scalars(uninterrupted)
    for line in metrics(uninterrupted):
        for name in ("loss", "eval/general/loss", "removed_fraction"):
            if name in line:
                assert found[name, line["step"]] == pytest.approx(line[name], rel=1e-6)


def test_the_curves_are_a_picture(uninterrupted):
    from matplotlib.image import imread

    pixels = imread(uninterrupted / "curves.png")
    assert pixels.shape[:2] == (1080, 1200)  # three rows of two: it refreshes
    assert np.ptp(pixels[..., :3]) > 0.5


def test_losses_of_pairs_have_axes_of_their_own(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    line = {"step": 1, "loss": 1.0, "eval/general/loss": 2.0}
    draw_curves([line], tmp_path / "sft.png")
    pairs = {"eval/pairs/loss": 0.7, "eval/pairs/rewards_margin": 0.1}
    draw_curves([line | pairs], tmp_path / "dpo.png")
    refreshed = {"references.0/loss": 1.5, "reference/captured_fraction": 0.3}
    draw_curves([line | refreshed], tmp_path / "refreshed.png")
    shown = [
        {axes.get_title(): [curve.get_label() for curve in axes.lines] for axes in figure.axes}
        for figure in drawn
    ]
    assert shown[0]["held-out loss, nats per token"] == ["eval/general/loss"]
    assert len(shown[0]) == 4
    assert shown[1]["held-out loss, nats per token"] == ["eval/general/loss"]
    assert shown[1]["held-out preference loss"] == ["eval/pairs/loss"]
    assert shown[1]["held-out reward margin"] == ["eval/pairs/rewards_margin"]
    assert shown[2]["reference loss, at refreshes"] == ["references.0/loss"]
    assert shown[2]["of the basis, at refreshes"] == ["reference/captured_fraction"]


def test_the_summary_is_that_of_the_metrics(uninterrupted):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    all_lines = metrics(uninterrupted)
    lines = [line for line in all_lines if "loss" in line]
    assert summary["steps"] == STEPS
    assert summary["train_loss"] == {"first": lines[0]["loss"], "last": lines[-1]["loss"]}
    assert summary["projection"]["refreshes"] == 2
    assert summary["projection"]["mean_removed_fraction"] == pytest.approx(
        np.mean([line["removed_fraction"] for line in lines])
    )
    assert summary["training_samples"] == 8 * STEPS
    assert summary["reference_samples"] == 2 * 12
    assert summary["warnings"] == judge_curve(load_config(uninterrupted / "config.yaml"), all_lines)
    assert summary["before"].keys() == summary["after"].keys() == {"general/loss"}
    change = summary["change"]["general/loss"]
    assert change["mean"] == pytest.approx(
        summary["after"]["general/loss"] - summary["before"]["general/loss"], abs=1e-5
    )
    assert 0 < change["standard_error"] < 1
    assert change["rows"] == 24


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_a_run_that_learned_nothing_says_so(
    ground, configured, tmp_path, on_some_devices, caplog, objective
):
    config = configured(
        tmp_path / "run",
        "optimizer.learning_rate=1e-9",
        f"objective={objective}",
        *([f"data.train.0.path={ground / 'pairs.jsonl'}"] if objective == "dpo" else []),
    )
    summary = run.train(config)
    [told] = [warning for warning in summary.warnings if "hardly anything was learned" in warning]
    assert "optimizer.learning_rate (1e-09)" in told
    assert told in caplog.messages
    assert abs(summary.change["general/loss"].mean) < 1e-4


def test_references_that_the_model_would_not_say_are_told_before_the_first_step(
    ground, configured, tmp_path, on_some_devices, caplog
):
    # A model that is sure of what it says, and says something else: its logits are 30 times as big.
    shutil.copytree(ground / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 30
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    config = configured(
        tmp_path / "run", f"model.path={tmp_path / 'model'}", "train={steps: 1, batch_size: 8}"
    )
    summary = run.train(config)
    [told] = [warning for warning in summary.warnings if "start at a high loss" in warning]
    assert told.startswith("references.0: ")
    assert told in caplog.messages
    line = metrics(tmp_path / "run")[0]
    assert line["step"] == 0
    assert line["references.0/loss"] - line["references.0/entropy"] > 1


def test_lost_metrics_leave_no_false_figure(interrupted, configured, on_some_devices):
    lines = (interrupted / "metrics.jsonl").read_text().splitlines()
    whole = json.loads(lines[-2])
    (interrupted / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines[-2:]))
    (interrupted / "export").mkdir()
    summary = run.train(configured(interrupted))
    assert summary.train_loss == TrainLoss(first=None, last=whole["loss"])
    assert summary.before == {}
    assert summary.reference_samples == 2 * 12
    assert summary.warnings == [
        f"the metrics of {STEPS - 1} of {STEPS} steps are lost; so is what needs them"
    ]


def test_rows_that_are_cut_or_left_out_are_told_with_what_to_set(
    ground, configured, tmp_path, caplog
):
    text = (ground / "safety.jsonl").read_text().splitlines()[:4]
    text += [json.dumps({"prompt": "red", "completion": "blue " * 60})] * 2
    text += [json.dumps({"prompt": "red " * 90, "completion": "blue"})]
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in text))
    train = f"data.train=[{{path: {tmp_path / 'rows.jsonl'}}}]"
    config = configured(tmp_path / "run", train, "data.too_long=skip")
    data = prepare_data(config, model_config(config))
    assert [line.partition(" (")[0] for line in data.warnings] == [
        "train: 1 rows are left out",
        "train: the answers of 2 of 6 rows",
    ]
    assert "raise data.max_length (128)" in data.warnings[1]
    assert all(warning in caplog.text for warning in data.warnings)
    config = configured(tmp_path / "run", train, "data.too_long=cut")
    assert "data.too_long: cut" in prepare_data(config, model_config(config)).warnings[0]
    config = configured(tmp_path / "run", train)
    with pytest.raises(InputError, match=r"line 7: .* set data\.too_long to skip or cut"):
        prepare_data(config, model_config(config))


def test_a_pair_is_two_samples_in_the_summary_as_everywhere(configured, tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    samples = {}
    for objective in ("sft", "dpo"):
        config = configured(tmp_path / "run", f"objective={objective}", "ogpsa.preset=off")
        samples[objective] = summarise(config, lines)["training_samples"]
        assert config.train.batch_size == 8
    assert samples == {"sft": 3 * 8, "dpo": 3 * 8 * 2}


def test_pairs_that_are_left_out_are_told(ground, configured, tmp_path, caplog):
    rows = (ground / "pairs.jsonl").read_text() + '{"prompt": "Q", "chosen": "", "rejected": "A"}\n'
    (tmp_path / "pairs.jsonl").write_text(rows)
    config = configured(
        tmp_path / "run",
        "objective=dpo",
        f"data.train=[{{path: {tmp_path / 'pairs.jsonl'}}}]",
    )
    prepare_data(config, model_config(config))
    assert "train: 1 rows are left out" in caplog.text
    assert "line 25: the chosen answer is empty" in caplog.text


def test_an_export_made_later_is_the_one_of_the_end(uninterrupted, tmp_path, caplog):
    with caplog.at_level("INFO", "ogpsa_jax"):
        exported = export_checkpoint(uninterrupted, tmp_path / "later")
    assert exported.step == STEPS
    write_model_card(uninterrupted, tmp_path / "later", exported.rounding)
    assert f"reading the checkpoint of step {STEPS}" in caplog.text
    assert "resuming" not in caplog.text  # nothing is trained
    names = {path.name for path in (uninterrupted / "export").iterdir()}
    assert "README.md" in names
    assert {path.name for path in (tmp_path / "later").iterdir()} == names
    for name in names:
        first, second = (uninterrupted / "export" / name, tmp_path / "later" / name)
        assert first.read_bytes() == second.read_bytes(), name


def test_an_export_brings_the_template_and_the_stop_tokens_of_the_training(
    ground, configured, tmp_path
):
    shutil.copytree(ground / "model", tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "model" / name
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"eos_token_id": 5, "bos_token_id": 0}))
    shutil.copytree(tmp_path / "model", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "added_tokens.json").write_text("{}")
    config = configured(
        tmp_path / "run",
        f"model.path={tmp_path / 'model'}",
        f"model.tokenizer={tmp_path / 'tokenizer'}",
        "data.template=alpaca",
    )
    model = prepare_model(config, make_mesh(MeshSection(fsdp=jax.device_count())))
    export(config, model, tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    assert tokenizer.chat_template == ChatTemplate(tokenizer, "alpaca").exported
    assert (tmp_path / "out" / "added_tokens.json").exists()
    assert read_config(tmp_path / "out").eos_token_ids == (5, tokenizer.eos_token_id)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 0
    weights = [load_file(tmp_path / f / "model.safetensors") for f in ("model", "out")]
    for name, tensor in weights[0].items():
        np.testing.assert_array_equal(weights[1][name], tensor)


def test_a_template_that_prints_the_date_prints_the_day_the_run_began(
    configured, tmp_path, monkeypatch
):
    source = "{{ strftime_now('%d %b %Y') + '\\n' }}" + BUILT_IN["chatml"]
    (tmp_path / "dated.jinja").write_text(source)
    config = configured(tmp_path / "run", f"data.template={tmp_path / 'dated.jinja'}")
    (tmp_path / "run").mkdir()

    def on(year: int):
        monkeypatch.setattr(inputs, "_today", lambda: datetime.date(year, 12, 4))
        date = inputs.run_date(tmp_path / "run")
        return prepare_data(config, model_config(config), date)

    tokenizer = load_tokenizer(str(config.model.path))
    first, other = on(2031), on(2032)
    assert tokenizer.decode(first.train[0].sequences[0].ids).startswith("04 Dec 2031\n")
    assert digest(first.train) != digest(other.train)
    inputs.check_same_inputs(tmp_path / "run", config, first)
    resumed = on(2032)
    inputs.check_same_inputs(tmp_path / "run", config, resumed)
    assert digest(resumed.train) == digest(first.train)

    class Reached(Exception):
        pass

    def prepared(config, model, date):
        raise Reached(date)

    monkeypatch.setattr(run, "prepare_data", prepared)
    with pytest.raises(Reached, match="2031-12-04"):
        run.train(config)
    path = tmp_path / "run" / "inputs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"date": "Monday"}))
    with pytest.raises(InputError, match="date must be a day such as 2031-12-04, not 'Monday'"):
        on(2033)


def test_the_dropout_of_the_configuration_holds_with_an_adapter(configured, tmp_path):
    mesh = make_mesh(MeshSection(fsdp=jax.device_count()))
    fresh = configured(tmp_path / "run", "model.lora={rank: 2, dropout: 0.1}")
    save_lora(prepare_model(fresh, mesh), tmp_path / "adapter")
    lora = f"model.lora={{adapter: {tmp_path / 'adapter'}, dropout: 0.3}}"
    model = prepare_model(configured(tmp_path / "run", lora), mesh)
    adapters = [linear.lora for linear in model.linears().values()]
    assert [(adapter.rank, adapter.dropout) for adapter in adapters] == [(2, 0.3)] * 7


def test_an_export_among_the_checkpoints_is_refused(uninterrupted):
    with pytest.raises(InputError, match="is among the run's checkpoints"):
        export_checkpoint(uninterrupted, uninterrupted / "checkpoints" / "9")
    assert not (uninterrupted / "checkpoints" / "9").exists()


def test_an_export_into_another_run_is_refused(uninterrupted, tmp_path):
    other = tmp_path / "other"
    for name in ("export", "adapter"):
        shutil.copytree(uninterrupted / "export", other / name)
    (other / "config.yaml").write_text("")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    for name in ("export", "adapter"):
        with pytest.raises(InputError, match=rf"is the {name} of the run other; choose another"):
            export_checkpoint(uninterrupted, other / name)
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_the_written_configuration_is_that_of_the_run(uninterrupted, configured):
    assert load_config(uninterrupted / "config.yaml") == configured(uninterrupted)


def test_a_run_whose_basis_is_empty_says_so_and_records_it(
    ground, configured, on_some_devices, tmp_path, caplog
):
    # A model of zeros: every gradient, and so every reference gradient, is zero.
    model = Path(shutil.copytree(ground / "model", tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    zeros = {name: np.zeros_like(value) for name, value in weights.items()}
    save_file(zeros, model / "model.safetensors")
    with caplog.at_level("WARNING", "ogpsa_jax"):
        summary = run.train(configured(tmp_path / "run", f"model.path={model}"))
    assert "the basis was empty, so nothing was projected" in caplog.text
    [warning] = [warning for warning in summary.warnings if "the basis was empty" in warning]
    assert warning.startswith(f"step 1 and {STEPS - 1} more: ")
    assert summary.projection.effective_rank == 0
    assert warning in json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"]


def test_refused_references_and_a_diverged_loss_are_found():
    lines = [
        {"step": step, "loss": loss, "effective_rank": 1.0, "refused_refreshes": refused}
        for step, loss, refused in [(1, 2.0, 0), (2, math.inf, 1), (3, math.nan, 1)]
    ]
    problems = find_problems(lines)
    assert problems.keys() == {"loss", "refused"}
    assert problems["loss"].startswith("step 2 and 1 more")
    assert problems["refused"].startswith("step 2:")
    assert find_problems(lines[:1]) == {}


def test_lines_after_the_resumed_step_and_half_lines_are_dropped(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "eval/a/loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 3.0}\n{"st'
    )
    log = MetricsLog(tmp_path, resume_step=2)
    log.write({"step": 3, "loss": 4.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 3]
    assert read_metrics(tmp_path)[-1]["loss"] == 4.0
    assert "lacks 1 of the 2 steps before the checkpoint" in caplog.text


@pytest.mark.parametrize("rest", [b"\xff\xfe\n", b"7\n", b'{"loss": 1.0}\n', b"{]\n"])
def test_metrics_count_up_to_the_first_line_that_is_not_whole(tmp_path, rest):
    whole = b'{"step": 1, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + rest + whole)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize("unit", ["targets", "pairs"])
def test_progress_counts_no_rate_before_there_is_one(capsys, unit):
    with RunProgress("run", unit) as progress:
        progress.begin(total=5, start=0)
        progress.add([{"step": step, "loss": 1.0, "weight": 7.0} for step in (1, 2)])
        progress.add([{"step": step, "loss": 0.5, "weight": 7.0} for step in (3, 4, 5)])
        progress.add([])
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first == "run: 2 of 5 steps  loss 1.0000"
    assert second.startswith("run: 5 of 5 steps  loss 0.5000  ")
    assert f"{unit}/s" in second


def test_a_preference_loss_is_counted_in_pairs(configured, tmp_path, capsys):
    for objective, unit in (("sft", "targets/s"), ("dpo", "pairs/s")):
        with progress_of(configured(tmp_path / "run", f"objective={objective}")) as progress:
            progress.begin(total=2, start=0)
            for step in (1, 2):
                progress.add([{"step": step, "loss": 0.5, "weight": 7.0}])
        assert unit in capsys.readouterr().err
