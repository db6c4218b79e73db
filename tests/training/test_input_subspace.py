"""A run whose subspace is one of inputs: through the trainer, from configuration to export."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from ogpsa_jax.config import load_config
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import Decoder, load_pretrained
from ogpsa_jax.models.config import read_config
from ogpsa_jax.models.decoder import DECODER_KERNELS
from ogpsa_jax.training.prepare import model_config, prepare_data
from ogpsa_jax.training.run import train

from .conftest import TINY

IN_STEP = "ogpsa.preset=in-step"
INPUTS = ("ogpsa={preset: recommended}", "references.in_step=null")
FAST = ("optimizer.learning_rate=1e-2", "optimizer.schedule=constant")


@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_of_what_the_kernels_multiply(tied):
    architecture = dataclasses.replace(read_config(TINY), tie_word_embeddings=tied)
    model = Decoder(architecture, rngs=nnx.Rngs(1))
    ids = jax.random.randint(jax.random.key(0), (2, 9), 3, architecture.vocab_size)
    segments = jnp.ones_like(ids).at[1, 5:].set(0)
    found = model.input_moments(ids, segment_ids=segments)
    names = {kernel.inputs for kernel in DECODER_KERNELS.values()}
    assert set(found) == names - ({"final_hidden"} if tied else set())
    inputs = {("attention_input", 0): normed(model, ids)}
    if not tied:
        inputs["final_hidden", ...] = model.hidden_states(ids, segment_ids=segments)
    for (name, layer), values in inputs.items():
        x = np.asarray(values, np.float64)[np.asarray(segments) > 0]
        moment = np.asarray(found[name].product, np.float64)[layer]
        np.testing.assert_allclose(moment, x.T @ x, atol=1e-5 * np.abs(x.T @ x).max())
    width = architecture.intermediate_size
    assert found["mlp_output"].product.shape == (architecture.num_layers, width, width)


def normed(model, ids):
    """What the first layer's attention projections multiply."""
    x = model.embed(ids)
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + model.config.rms_norm_eps)


def test_no_reference_row_sees_what_the_first_layer_learns(configured, tmp_path):
    """Its inputs stay as they are (embeddings are frozen), so this holds after any number of steps.

    Two reference rows: their tokens leave some of the hidden dimensions free.
    """
    config = configured(
        tmp_path / "run", *INPUTS, *FAST, "ogpsa.energy=1.0", "references.sets.0.samples=2"
    )
    train(config)
    paths = (config.model.path, tmp_path / "run" / "export")
    first, last = (load_pretrained(path, dtype="float32") for path in paths)
    assert jnp.array_equal(first.embed_tokens.embedding[...], last.embed_tokens.embedding[...])
    (rows,) = prepare_data(config, model_config(config)).references
    x = np.concatenate([normed(first, row.sequences[0].ids[None])[0] for row in rows])
    x = x.astype(np.float64)
    assert np.linalg.matrix_rank(x) < x.shape[1], "the rows leave nothing free: fewer are needed"
    for name in ("q_proj", "k_proj", "v_proj"):
        before, after = (
            np.asarray(getattr(model.layers.self_attn, name).kernel[0], np.float64)
            for model in (first, last)
        )
        change = after - before
        assert np.linalg.norm(change) > 1e-3
        # Sums of eight float32 steps, each rounded when it is added to the weights.
        assert np.linalg.norm(x @ change) < 1e-4 * np.linalg.norm(x) * np.linalg.norm(change)


def test_the_preset_is_filled_in(configured, tmp_path):
    config = configured(tmp_path, *INPUTS, "references={sets: [{path: somewhere}]}")
    assert (config.ogpsa.placement, config.ogpsa.energy, config.ogpsa.others) == (
        *("both", 0.98, "freeze"),
    )
    assert config.references.in_step is None


def test_a_cap_is_told_and_what_it_holds(configured, tmp_path):
    summary = train(configured(tmp_path / "run", *INPUTS, "ogpsa.rank=1"))
    assert any("because ogpsa.rank (1) caps it" in warning for warning in summary.warnings)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    steps = [line for line in lines if "least_coverage" in line]
    assert all(0 < line["least_coverage"] < 0.98 for line in steps)
    assert steps[-1]["steps_since_refresh"] == steps[-1]["step"]  # spanned once
    assert summary.projection.refreshes == 1


def test_references_are_replayed_too(configured, tmp_path, on_some_devices):
    in_step = "references.in_step={share: 0.5, replay_weight: 8.0}"
    summary = train(configured(tmp_path / "run", *INPUTS, in_step))
    assert summary.reference_samples == summary.training_samples
    assert summary.projection.mean_removed_fraction > 0


def test_a_run_cut_short_goes_on_with_its_subspace_to_the_same_bits(configured, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(configured(whole, *INPUTS, *FAST))
    shutil.copytree(whole, cut)
    newest = max((cut / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for gone in (newest, cut / "export"):
        shutil.rmtree(gone)
    for name in ("summary.json", "curves.png"):
        (cut / name).unlink()
    train(configured(cut, *INPUTS, *FAST))
    for name in ("export/model.safetensors", "metrics.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_no_reference_row_sees_what_an_adapter_learns(configured, tmp_path):
    config = configured(
        tmp_path / "run",
        *(*INPUTS, *FAST, "ogpsa.energy=1.0", "references.sets.0.samples=1"),
        "model.lora={rank: 2, targets: [q_proj]}",
    )
    train(config)
    first = load_pretrained(config.model.path, dtype="float32")
    (rows,) = prepare_data(config, model_config(config)).references
    x = np.concatenate([normed(first, row.sequences[0].ids[None])[0] for row in rows])
    (file,) = (tmp_path / "run" / "adapter").glob("*.safetensors")
    tensors = {name: value for name, value in load_file(file).items() if ".layers.0." in name}
    a, b = (next(v for n, v in tensors.items() if part in n) for part in ("lora_A", "lora_B"))
    assert np.linalg.norm(b) > 1e-3
    assert np.linalg.norm(x @ a.T) < 1e-4 * np.linalg.norm(x) * np.linalg.norm(a)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((IN_STEP, "ogpsa.energy=0.9"), "ogpsa.energy needs ogpsa.subspace: inputs; .*recommended"),
        ((IN_STEP, "ogpsa.subspace=inputs"), "ogpsa.energy: .* inputs needs it; .*recommended"),
        ((*INPUTS, "ogpsa.others=null"), "ogpsa.others: a subspace of inputs needs it"),
        ((*INPUTS, "ogpsa.refresh.every=5"), "ogpsa.refresh: .* spanned once"),
        ((*INPUTS, "ogpsa.project_momentum=true"), "project_momentum needs .*gradients"),
        ((*INPUTS, "references.in_step.window=8"), "references.in_step.window: .* set it to null"),
        ((IN_STEP, "ogpsa.rank=65"), "64 at most"),
        ((*INPUTS, "ogpsa.scope=global"), "ogpsa.scope needs ogpsa.subspace: gradients"),
        ((*INPUTS, "references.target=initial"), "references.target: .* set references.in_step"),
        ((*INPUTS, "ogpsa.rule=conflict"), "conflict needs ogpsa.subspace: gradients"),
        ((*INPUTS, "ogpsa.placement=gradient"), "does not keep AdamW's steps out"),
        ((*INPUTS, "ogpsa.placement=update"), "is no descent of the loss; set it to both"),
        ((*INPUTS, "model.lora={adapter: somewhere}"), "merge it into the model first"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, told):
    with pytest.raises(InputError, match=told):
        load_config("configs/smoke-sft.yaml", list(overrides))


def test_prompts_need_no_answers_and_nobody_is_asked_for_any(configured, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"red green {i}"}) + "\n" for i in range(6)))
    prompts = f"references={{sets: [{{path: {path}}}]}}"
    config = configured(tmp_path / "run", *INPUTS, *FAST, prompts)
    assert not config.asks_initial_model
    summary = train(config)
    assert summary.projection.mean_removed_fraction > 0
