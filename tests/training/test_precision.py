"""What a run learned is what it hands on: across stages, exports and low precision."""

import json
import random
import runpy
import secrets
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from ogpsa_jax.cli import main
from ogpsa_jax.config import RunConfig
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import load_pretrained, merge_pretrained
from ogpsa_jax.reporting.model_card import write_missing_card
from ogpsa_jax.training import Hooks, run
from ogpsa_jax.training.metrics import find_lost_updates
from ogpsa_jax.training.optimizer import apply_updates, clip_by_global_norm, global_norm
from ogpsa_jax.training.prepare import prepare_model

from .conftest import REPOSITORY, metrics, some_devices

# Small enough that bfloat16 keeps little of it: its weights move in steps of a 256th of themselves.
SMALL = "optimizer.learning_rate=2e-5"
# Sums over the same rows by the same programs; only the weights' way onto the disk lies between.
ROUND_OFF = 1e-6


def in_bfloat16(folder: Path, target: Path) -> Path:
    """A copy of a model folder with bfloat16 weights."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    narrow = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}
    save_file(narrow, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def narrow(ground, tmp_path_factory) -> Path:
    """The small model in bfloat16."""
    return in_bfloat16(ground / "model", tmp_path_factory.mktemp("narrow") / "model")


@pytest.fixture(scope="module")
def first(narrow, configured, tmp_path_factory) -> Path:
    """A finished run that began with the bfloat16 model, with float32 parameters."""
    folder = tmp_path_factory.mktemp("stages") / "first"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", some_devices)
        run.train(
            configured(folder, f"model.path={narrow}", SMALL), Hooks(on_finish=write_missing_card)
        )
    return folder


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("path", ["{}", "{}/export"])
def test_a_later_stage_starts_from_the_weights_that_the_last_one_reported(
    first, configured, on_some_devices, tmp_path, path
):
    second = configured(
        tmp_path / "second", f"model.path={path.format(first)}", SMALL, "train.steps=1"
    )
    before = run.train(second).before
    reported = summary_of(first)
    assert before == pytest.approx(reported["after"], rel=ROUND_OFF)
    # The test could not fail if the export had lost nothing.
    assert reported["rounding"]["update_kept"] < 0.95
    assert reported["rounding"]["rounded"]["general/loss"] != reported["after"]["general/loss"]


def test_stages_of_one_command_and_of_lora_hand_on_everything(
    narrow, ground, on_some_devices, tmp_path
):
    lora = ["model.lora={rank: 4}", "optimizer.learning_rate=1e-3"]
    first, second, third = run.train_stages(
        [ground / "run.yaml"] * 3,
        [f"model.path={narrow}"],
        output_dirs=[str(tmp_path / name) for name in ("a", "b", "c")],
        stage_overrides=[lora, [SMALL], ["train.steps=1"]],
    )
    # The first evaluates base and adapters apart, the second their sum: float32 round-off.
    assert second.before == pytest.approx(first.after, rel=1e-5)
    assert third.before == pytest.approx(second.after, rel=ROUND_OFF)
    # What the first export rounded away counts again: never more than there is, never the reverse.
    # (Rounding to the nearest overshoots where it rounds up; over all weights that is little.)
    for stage in (first, second, third):
        assert -0.05 < stage.rounding.update_kept < 1.05
    assert first.rounding.dtype == second.rounding.dtype == "bfloat16"


def test_a_real_bfloat16_model_at_the_published_rate_keeps_what_the_script_prints(
    real_data, tmp_path, on_some_devices, monkeypatch, capsys
):
    monkeypatch.setenv("OGPSA_DATA", str(real_data))
    script = runpy.run_path(str(REPOSITORY / "scripts/measure_precision.py"))
    script["main"](["--steps", "20", "--out", str(tmp_path)])
    first, second = (summary_of(tmp_path / f"float32-seed0{end}") for end in ("", "-next"))
    assert second["before"] == pytest.approx(first["after"], rel=ROUND_OFF)
    assert first["rounding"]["update_kept"] < 0.5
    before, after, rounded = (
        part["safety/loss"]
        for part in (first["before"], first["after"], first["rounding"]["rounded"])
    )
    assert abs(rounded - after) > 0.1 * abs(after - before)
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == list(script["COLUMNS"])
    assert [row[0] for row in rows[1:]] == list(script["PARAMETERS"])
    assert rows[1][2:6] == [f"{loss:.4f}" for loss in (before, after, rounded, after)]
    applied = [float(row[7].rstrip("%")) for row in rows[1:]]
    # Float32 rounds a little, bfloat16 nearly all; at random, what is lost is noise: over 20 steps
    # of 260,000 weights some hundredths.
    assert applied[0] == pytest.approx(100, abs=1)
    assert applied[1] < 50
    assert applied[2] == pytest.approx(100, abs=20)


def test_the_reference_model_of_a_dpo_stage_is_the_model_as_trained(
    first, configured, on_some_devices, tmp_path, ground, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pairs = f"{{path: {ground / 'pairs.jsonl'}}}"
    for name, reference in (("initial", "initial"), ("folder", first / "export")):
        summary = run.train(
            configured(
                tmp_path / name,
                f"model.path={first}",
                *("objective=dpo", "train.steps=1", f"data.train=[{pairs}]", "references.sets=[]"),
                *("ogpsa.preset=off", f"dpo.reference_model={reference}"),
                f"data.eval={{pairs: {{path: {ground / 'pairs.jsonl'}, measure: preference}}}}",
            )
        )
        # Equal policies: log 2, whatever the pairs. A rounded reference would be off by its change.
        assert summary.before["pairs/loss"] == pytest.approx(np.log(2), abs=ROUND_OFF)


def test_what_rounding_leaves_is_measured_told_and_on_the_card(first, narrow, caplog):
    found = summary_of(first)["rounding"]
    folders = {
        "start": load_file(narrow / "model.safetensors"),
        "trained": load_file(first / "export/unrounded/model.safetensors"),
        "rounded": load_file(first / "export/model.safetensors"),
    }
    start, trained, rounded = (
        np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])
        for tensors in folders.values()
    )
    update = trained - start
    share = (rounded - start) @ update / (update @ update)
    assert share < 0.9
    assert found["update_kept"] == pytest.approx(share, rel=1e-4)  # float32 sums of 1e5 products
    assert found["dtype"] == "bfloat16"
    [warning] = [w for w in summary_of(first)["warnings"] if "export" in w]
    assert f"keep {share:.0%} of the update" in warning
    card = (first / "export/README.md").read_text()
    assert "## Rounding" in card
    assert f"Rounding leaves {found['update_kept']:.1%} of the last stage's update." in card
    assert f"| {found['rounded']['general/loss']:.4g} |" in card


def test_an_export_is_measured_as_it_will_be_read(first, configured, on_some_devices, tmp_path):
    model = load_pretrained(first / "export", dtype="float32")
    served = np.asarray(model.embed_tokens.embedding[...])
    assert (served == served.astype(ml_dtypes.bfloat16)).all()
    # Taken out of the run, without the unrounded weights: what the last stage measured as rounded.
    plain = tmp_path / "plain"
    shutil.copytree(first / "export", plain, ignore=shutil.ignore_patterns("unrounded", ".ogpsa*"))
    config = configured(tmp_path / "run", f"model.path={plain}", "train.steps=1")
    assert run.train(config).before == pytest.approx(
        summary_of(first)["rounding"]["rounded"], rel=ROUND_OFF
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_of_an_export_is_the_one_asked_for(
    first, on_some_devices, tmp_path, capsys, dtype
):
    target = tmp_path / "out"
    assert main(["export", str(first), str(target), "--dtype", dtype]) == 0
    weights = load_file(target / "model.safetensors")
    assert {value.dtype.name for value in weights.values()} == {dtype}
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == dtype
    trained = load_file(first / "export/unrounded/model.safetensors")
    for name, value in weights.items():
        np.testing.assert_array_equal(value, trained[name].astype(value.dtype))
    card = (target / "README.md").read_text()
    assert ("## Rounding" in card) == (dtype != "float32")
    assert not (target / "unrounded").exists()


def test_a_float32_export_hands_on_everything_and_keeps_nothing_twice(
    narrow, configured, on_some_devices, tmp_path
):
    config = configured(
        tmp_path / "run", f"model.path={narrow}", SMALL, "train.steps=1", "export.dtype=float32"
    )
    summary = run.train(config)
    assert summary.rounding is None
    assert not [w for w in summary.warnings if "export" in w]
    assert not (tmp_path / "run/export/unrounded").exists()
    with pytest.raises(InputError, match=r"another export\.dtype; .*--dtype bfloat16"):
        run.train(
            configured(
                tmp_path / "run",
                *(f"model.path={narrow}", SMALL, "train.steps=1", "export.dtype=bfloat16"),
            )
        )


def test_unrounded_weights_that_do_not_belong_to_the_export_are_refused(
    first, configured, tmp_path
):
    copy = tmp_path / "export"
    shutil.copytree(first / "export", copy)
    config = configured(tmp_path / "run", f"model.path={copy}")
    mesh = some_devices(config.mesh)
    prepare_model(config, mesh)
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = -weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="so one of the two was changed"):
        prepare_model(config, mesh)
    shutil.rmtree(copy / "unrounded")
    with pytest.raises(InputError, match="the weights as trained were written here and are gone"):
        prepare_model(config, mesh)


def test_a_merge_takes_the_weights_as_trained(first, narrow, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(narrow, wide)
    start = load_file(narrow / "model.safetensors")
    start = {name: value.astype(np.float32) for name, value in start.items()}
    save_file(start, wide / "model.safetensors", metadata={"format": "pt"})
    merge_pretrained(wide, first, [0.5], [tmp_path / "merged"])
    trained = load_file(first / "export/unrounded/model.safetensors")
    for name, value in load_file(tmp_path / "merged/model.safetensors").items():
        np.testing.assert_array_equal(value, np.float32(0.5) * start[name] + trained[name] / 2)


def test_a_stage_that_cannot_hold_what_the_last_one_learned_says_so(
    first, configured, on_some_devices, tmp_path, caplog
):
    narrow = ["model.param_dtype=bfloat16", "train.steps=1"]
    summary = run.train(configured(tmp_path / "run", f"model.path={first}", *narrow))
    [warning] = [w for w in summary.warnings if w.startswith("model.param_dtype")]
    assert "rounds the float32 weights" in warning
    assert warning in caplog.text


def test_updates_that_do_not_reach_bfloat16_parameters_are_logged_and_warned_of(
    narrow, configured, on_some_devices, tmp_path, caplog
):
    small = [f"model.path={narrow}", "model.param_dtype=bfloat16", SMALL]
    summary = run.train(configured(tmp_path / "nearest", *small))
    lines = [line for line in metrics(tmp_path / "nearest") if "loss" in line]
    assert lines[0]["applied_fraction"] < 0.5
    assert lines[0]["applied_update_norm"] < lines[0]["update_norm"]
    [warning] = [w for w in summary.warnings if "reached the parameters" in w]
    assert "set model.param_dtype to float32" in warning
    assert "reached the parameters" in caplog.text

    rounded = [*small, "optimizer.stochastic_rounding=true"]
    summary = run.train(configured(tmp_path / "random", *rounded))
    assert not [w for w in summary.warnings if "reached the parameters" in w]
    wide = run.train(configured(tmp_path / "wide", f"model.path={narrow}", SMALL))
    assert not [w for w in wide.warnings if "reached the parameters" in w]
    for line in metrics(tmp_path / "wide"):
        if "loss" in line:
            assert line["applied_update_norm"] == pytest.approx(line["update_norm"], rel=1e-2)


def test_random_rounding_is_right_on_average_and_the_same_for_the_same_key():
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"w": jax.random.normal(keys[0], (200, 500)).astype(jnp.bfloat16)}
    updates = {"w": 1e-4 * jax.random.normal(keys[1], (200, 500)).astype(jnp.bfloat16)}
    apply = jax.jit(apply_updates)
    new, _, share = apply(params, updates, keys[2])
    again, _, _ = apply(params, updates, keys[2])
    np.testing.assert_array_equal(new["w"], again["w"])
    old, update, value = (
        np.asarray(tree["w"]).astype(np.float64) for tree in (params, updates, new)
    )
    step = 2.0 ** (np.floor(np.log2(np.abs(old))) - 7)  # from one bfloat16 to the next
    # One of the two neighbours of the sum, whose binade may be the next.
    near = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(old + update), 2.0**-126))) - 7)
    assert (np.abs(value - (old + update)) <= 1.001 * near).all()
    # ⟨change, update⟩ has mean ⟨update, update⟩ and, entry by entry, a variance of at most
    # update² · step · |update|: five deviations.
    noise = np.sqrt((np.abs(update) ** 3 * step).sum()) / (update**2).sum()
    assert abs(float(share) - 1) < 5 * noise
    assert noise < 0.05
    nearest, _, share = apply(params, updates)
    np.testing.assert_array_equal(nearest["w"], params["w"] + updates["w"])
    assert float(share) < 0.5


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 0.0])
def test_random_rounding_leaves_what_is_no_number_alone(value):
    params = {"w": jnp.full((64,), value, jnp.bfloat16)}
    new, _, _ = apply_updates(params, {"w": jnp.zeros(64, jnp.bfloat16)}, jax.random.key(0))
    np.testing.assert_array_equal(*(tree["w"].astype(jnp.float32) for tree in (new, params)))


def test_steps_at_the_end_of_the_schedule_do_not_count_as_lost():
    def line(step: int, rate: float, share: float) -> dict:
        return {
            "step": step, "loss": 1.0, "learning_rate": rate,
            "update_norm": rate, "applied_fraction": share,
        }  # fmt: skip

    coarse, fine = (
        RunConfig.model_validate(
            {
                "ogpsa": {"preset": "off"},
                "model": {"param_dtype": dtype},
                "optimizer": {"learning_rate": 1e-6},
            }
        )
        for dtype in ("bfloat16", "float32")
    )
    assert find_lost_updates([line(1, 1e-6, 0.99), line(2, 1e-9, 0.1)], coarse) == {}
    assert find_lost_updates([line(2, 1e-9, 0.1)], coarse) == {}
    lost = [line(1, 1e-6, 0.02), line(2, 9e-7, 0.02)]
    told = find_lost_updates(lost, coarse)["applied"]
    assert told.startswith("steps 1 to 2: only 2.0% of the updates reached")
    assert find_lost_updates(lost, fine) == {}  # there is no better type to recommend


def test_random_rounding_is_for_bfloat16_parameters_alone():
    with pytest.raises(ValueError, match=r"is for model\.param_dtype: bfloat16, not float32"):
        RunConfig.model_validate(
            {
                "ogpsa": {"preset": "off"},
                "optimizer": {"learning_rate": 1e-6, "stochastic_rounding": True},
            }
        )


def test_a_weight_that_float16_cannot_hold_is_refused(ground, tmp_path):
    from ogpsa_jax.models import save_pretrained

    model = load_pretrained(ground / "model", dtype="float32")
    table = model.embed_tokens.embedding
    table.set_value(table[...].at[0, 0].set(1e5))
    with pytest.raises(InputError, match=r"embed_tokens\.weight has 1e\+05, more than float16"):
        save_pretrained(model, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_and_clipping_count_every_leaf_of_a_large_model(dtype):
    # In bfloat16 the sum of these squares stops at 256: its next number is 258.
    tree = {str(i): jnp.ones((1,), dtype) for i in range(900)}
    assert float(global_norm(tree)) == 30.0
    clip = clip_by_global_norm(3.0)
    clipped, _ = clip.update(tree, clip.init(tree))
    # One rounding of the quotient and one of the product, each 2⁻⁸ at most.
    np.testing.assert_allclose(float(global_norm(clipped)), 3.0, rtol=2**-7)
    assert all(leaf.dtype == dtype for leaf in clipped.values())
    short, _ = clip_by_global_norm(31.0).update(tree, clip.init(tree))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, short, tree))


def test_clipping_is_that_of_optax_in_float32():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    tree = [jnp.asarray(rng.standard_normal(n), jnp.float32) for n in (3, 5)]
    for most in (0.5, 100.0):
        ours, theirs = (
            jax.jit(clip.update)(tree, optax.EmptyState())[0]
            for clip in (clip_by_global_norm(most), optax.clip_by_global_norm(most))
        )
        assert jax.tree.all(jax.tree.map(jnp.array_equal, ours, theirs))
