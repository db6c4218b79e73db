"""Adapters: they start as nothing, compute what ``peft``'s compute, and merge into the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file

from ogpsa_jax.errors import InputError
from ogpsa_jax.models import (
    Decoder,
    LoraParam,
    add_lora,
    generate,
    load_lora,
    load_pretrained,
    merge_lora,
    param_shardings,
    save_lora,
    save_pretrained,
)
from ogpsa_jax.models.layers import Adapter
from ogpsa_jax.models.lora import TARGETS

from .conftest import SMALL, load_torch, relative_error

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
# As in test_parity: float32 roundings in the largest sums stay below this.
TOLERANCE = 1e-5


def draw_adapters(model: Decoder, rng: np.random.Generator, **options: Any) -> None:
    """Adapters that do something: b is not zero."""
    options = {"rank": 3, "alpha": float(rng.uniform(1, 8)), **options}
    add_lora(model, rngs=nnx.Rngs(int(rng.integers(2**31))), **options)
    for linear in model.linears().values():
        if linear.lora is not None:
            b = linear.lora.b
            b.set_value(jnp.asarray(rng.normal(0, 0.2, b.shape), b.dtype))


def draw_peft_adapter(
    base: Path, rng: np.random.Generator, folder: Path, **options: Any
) -> peft.PeftModel:
    """An adapter made and saved by ``peft`` on the torch model."""
    settings = {
        "r": int(rng.integers(1, 5)),
        "lora_alpha": int(rng.integers(1, 9)),
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    model = peft.get_peft_model(load_torch(base), peft.LoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.eval()
    model.save_pretrained(folder)
    return model


def draw_ids(model: Decoder, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, model.config.vocab_size, (2, 12)).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_no_bit(dtype: str, small: Path, rng: np.random.Generator) -> None:
    model = load_pretrained(small, dtype=dtype)
    ids = draw_ids(model, rng)
    before = np.asarray(model(ids))
    add_lora(model, rank=3, alpha=6.0, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(np.asarray(model(ids)), before)


def test_adapters_start_as_those_of_peft(small: Path) -> None:
    model = load_pretrained(small)
    rank = 400  # many numbers, so that their spread tells the distribution
    add_lora(model, rank=rank, alpha=1.0, rngs=nnx.Rngs(3))
    theirs = peft.get_peft_model(
        load_torch(small), peft.LoraConfig(r=rank, target_modules=list(TARGETS))
    )
    a_of = {
        name.split(".")[-4]: p.detach().numpy()
        for name, p in theirs.named_parameters()
        if "lora_A" in name and ".layers.0." in name
    }
    for path, linear in model.linears().items():
        assert linear.lora is not None
        a, b = np.asarray(linear.lora.a[...]), np.asarray(linear.lora.b[...])
        assert not b.any()
        assert a.shape == (model.config.num_layers, linear.kernel.shape[1], rank)
        bound = linear.kernel.shape[1] ** -0.5
        for values in (a[0], a[-1], a_of[path[-1]]):
            # Uniform: the largest of n >= 9600 falls short of the bound by 1/1000 once in e^9.
            assert 0.998 * bound < np.abs(values).max() <= bound
            # Standard error of the second moment: sqrt(4/45 / n) <= 0.0031 bounds squared.
            assert abs(np.mean(values**2) / bound**2 - 1 / 3) < 0.02
        assert np.abs(a[0] - a[-1]).max() > 0.5 * bound


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["q_proj", "lm_head"]}, "q_proj, k_proj.*lm_head"),
        ({"targets": []}, "got none"),
        ({"rank": 0}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, words: str, small: Path) -> None:
    model = load_pretrained(small)
    with pytest.raises(ValueError, match=words):
        add_lora(model, **{"rank": 2, "alpha": 2.0, "rngs": nnx.Rngs(0), **options})


def test_models_with_adapters_get_no_others(
    small: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = load_pretrained(small)
    with pytest.raises(ValueError, match="must have adapters"):
        save_lora(model, tmp_path / "adapter")
    draw_adapters(model, rng, targets=["v_proj"])
    save_lora(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="no adapters yet"):
        add_lora(model, rank=2, alpha=2.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no adapters yet"):
        load_lora(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", list(TARGETS)), ("qwen2", ["q_proj", "v_proj"])]
)
def test_an_adapter_of_peft_gives_equal_logits_and_gradients(
    family: str,
    targets: list[str],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    checkpoint = make_checkpoint(family, **SMALL)
    theirs = draw_peft_adapter(checkpoint, rng, tmp_path / "adapter", target_modules=targets)
    model = load_pretrained(checkpoint, dtype="float32")
    load_lora(model, tmp_path / "adapter")
    ids = draw_ids(model, rng)
    weights = rng.normal(size=(2, 12, model.config.vocab_size)).astype(np.float32)

    logits = theirs.double()(torch.tensor(ids).long()).logits
    (logits * torch.tensor(weights)).sum().backward()
    exact = {
        name.replace(".default", ""): p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    graphdef, adapters, rest = nnx.split(model, LoraParam, ...)

    def loss(adapters: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, adapters, rest)(ids) * weights)

    assert relative_error(model(ids), logits.detach().numpy()) <= TOLERANCE
    nnx.update(model, jax.grad(loss)(adapters))
    save_lora(model, tmp_path / "gradients")
    ours = load_file(tmp_path / "gradients" / "adapter_model.safetensors")
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert relative_error(value, exact[name]) <= TOLERANCE, name


def test_peft_loads_an_adapter_of_ours_with_equal_logits_and_merged_weights(
    small: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = load_pretrained(small, dtype="float32")
    draw_adapters(model, rng)
    ids = draw_ids(model, rng)
    save_lora(model, tmp_path / "adapter")
    save_pretrained(merge_lora(model), tmp_path / "merged")

    base = load_torch(small)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").double().eval()
    with torch.no_grad():
        exact = theirs(torch.tensor(ids).long()).logits.numpy()
        weights = theirs.merge_and_unload().state_dict()
    assert relative_error(model(ids), exact) <= TOLERANCE
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert relative_error(value, weights[name].numpy()) <= TOLERANCE, name


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_adapters_come_back_bit_for_bit(
    param_dtype: str,
    small: Path,
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    model = load_pretrained(small, param_dtype=param_dtype)
    draw_adapters(model, rng, targets=["k_proj", "down_proj"], dropout=0.25)
    save_lora(model, tmp_path / "adapter")
    again = load_pretrained(model.source, param_dtype=param_dtype)
    load_lora(again, tmp_path / "adapter")
    assert nnx.split(again)[0] == nnx.split(model)[0]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def test_an_export_holds_the_merged_weights_and_leaves_the_model_alone(
    small: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = load_pretrained(small, dtype="float32")
    draw_adapters(model, rng, targets=["o_proj", "gate_proj"])
    ids = draw_ids(model, rng)
    before = np.asarray(model(ids))
    save_pretrained(model, tmp_path / "export")
    merged = merge_lora(model)
    np.testing.assert_array_equal(np.asarray(model(ids)), before)

    exported = load_pretrained(tmp_path / "export", dtype="float32")
    assert jax.tree.structure(nnx.state(exported)) == jax.tree.structure(nnx.state(merged))
    assert not nnx.to_flat_state(nnx.state(exported, LoraParam))
    assert relative_error(exported(ids), before) <= TOLERANCE
    assert relative_error(merged(ids), before) <= TOLERANCE
    untouched = load_file(small / "model.safetensors")
    for name, value in load_file(tmp_path / "export" / "model.safetensors").items():
        adapted = "o_proj.weight" in name or "gate_proj" in name
        assert np.array_equal(value, untouched[name]) != adapted, name
    prompts = [row[:5].tolist() for row in ids]
    assert generate(model, prompts, max_new_tokens=8) == generate(merged, prompts, max_new_tokens=8)


def test_merging_sums_in_float32(small: Path, rng: np.random.Generator) -> None:
    model = load_pretrained(small, param_dtype="bfloat16")
    draw_adapters(model, rng)
    linear, merged = model.layers.mlp.up_proj, merge_lora(model).layers.mlp.up_proj
    kernel, a, b = (
        np.asarray(value[...], np.float64)
        for value in (linear.kernel, linear.lora.a, linear.lora.b)
    )
    exact = kernel + linear.lora.alpha / linear.lora.rank * a @ b
    assert merged.kernel.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 places, and a float32 rounding more.
    error = np.abs(np.asarray(merged.kernel[...], np.float64) - exact)
    assert np.all(error <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-6)


def test_dropout_zeroes_its_share_and_scales_the_rest(
    small: Path, rng: np.random.Generator
) -> None:
    model = load_pretrained(small)
    rate, size = float(rng.uniform(0.2, 0.6)), model.config.hidden_size
    add_lora(model, rank=size, alpha=size, targets=["q_proj"], dropout=rate, rngs=nnx.Rngs(0))
    adapter = model.layers.self_attn.q_proj.lora
    assert adapter is not None
    identity = jnp.eye(size)
    adapter.a.set_value(identity)  # one layer of the stack, and an adapter that does nothing else
    adapter.b.set_value(identity)
    x = jnp.ones((1000, size))
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), len(x))
    y = np.asarray(adapter(x, keys))
    # A row drops the same, whatever rows come with it.
    np.testing.assert_array_equal(adapter(x[300:700], keys[300:700]), y[300:700])
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
    # Six standard errors of a frequency among 32000.
    assert abs(kept.mean() - (1 - rate)) < 6 * 0.5 / 32000**0.5
    np.testing.assert_array_equal(adapter(x, None), x)


def test_every_layer_and_projection_drops_by_a_key_of_its_own(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pretrained(small, dtype="float32", remat="full")
    add_lora(model, rank=2, alpha=2.0, dropout=0.5, rngs=nnx.Rngs(0))
    seen: list[bytes] = []

    def record(adapter: Adapter, x: jax.Array, keys: jax.Array) -> jax.Array:
        jax.debug.callback(
            lambda data: seen.append(np.asarray(data).tobytes()), jax.random.key_data(keys)
        )
        return original(adapter, x, keys)

    original = Adapter.__call__
    monkeypatch.setattr(Adapter, "__call__", record)
    ids = jnp.zeros((1, 4), jnp.int32)
    model(ids, dropout_keys=jax.random.key(0)[None]).block_until_ready()
    jax.effects_barrier()
    assert len(set(seen)) == len(seen) == model.config.num_layers * len(TARGETS)


def test_rematerialised_layers_give_the_same_gradients_and_drop_the_same(
    small: Path, rng: np.random.Generator
) -> None:
    """The model taken apart and put together as the trainer does, in nested dicts of arrays."""
    results = {}
    seed = int(rng.integers(2**31))
    for remat in ("none", "full", "dots"):
        model = load_pretrained(small, dtype="float32", remat=remat)
        draw_adapters(model, np.random.default_rng(seed), rank=2, dropout=0.3)
        ids = draw_ids(model, np.random.default_rng(seed))
        graphdef, adapters, rest = nnx.split(model, LoraParam, ...)
        trained, frozen = nnx.to_pure_dict(adapters), nnx.to_pure_dict(rest)

        @jax.jit
        def gradient(
            trained: Any, frozen: Any, key: Any, graphdef: Any = graphdef, ids: Any = ids
        ) -> Any:
            def loss(trained: Any, frozen: Any) -> jax.Array:
                model = nnx.merge(graphdef, trained, frozen)
                return jnp.sum(
                    jax.nn.log_softmax(model(ids, dropout_keys=jax.random.split(key, len(ids))))[
                        ..., 0
                    ]
                )

            return jax.value_and_grad(loss, argnums=(0, 1))(trained, frozen)

        results[remat] = gradient(trained, frozen, jax.random.key(seed))
        if remat == "full":
            assert set(trained) == {"layers"}
            assert len(jax.tree.leaves(trained)) == 2 * len(TARGETS)
            again = gradient(trained, frozen, jax.random.key(seed))
            jax.tree.map(np.testing.assert_array_equal, again, results[remat])
            other = gradient(trained, frozen, jax.random.key(seed + 1))
            assert other[0] != again[0]
    for remat in ("full", "dots"):
        for value, exact in zip(
            jax.tree.leaves(results[remat]), jax.tree.leaves(results["none"]), strict=True
        ):
            assert relative_error(value, exact) <= TOLERANCE


def test_sharded_adapters_equal_those_of_one_device(
    small: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    seed = int(rng.integers(2**31))
    models = [load_pretrained(small, dtype="float32", mesh=place) for place in (None, mesh)]
    for model in models:
        draw_adapters(model, np.random.default_rng(seed))
    single, sharded = models
    ids = draw_ids(single, rng)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(sharded), nnx.state(single))
    save_lora(sharded, tmp_path / "adapter")
    loaded = load_pretrained(small, dtype="float32", mesh=mesh)
    load_lora(loaded, tmp_path / "adapter")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(single))
    expected = param_shardings(loaded, mesh, loaded.placement.rules)
    for (path, variable), (_, sharding) in zip(
        nnx.to_flat_state(nnx.state(loaded)), nnx.to_flat_state(expected), strict=True
    ):
        value = variable.get_value()
        assert value.sharding.is_equivalent_to(sharding.get_value(), value.ndim), path
    a = loaded.layers.mlp.down_proj.lora.a[...]
    assert a.addressable_shards[0].data.size == a.size // 4  # over fsdp and tensor
    merged = merge_lora(loaded)
    kernel = merged.layers.mlp.down_proj.kernel[...]
    assert kernel.sharding == loaded.layers.mlp.down_proj.kernel[...].sharding
    exact = single(ids)
    for model in (loaded, merged):
        assert relative_error(nnx.jit(lambda model: model(ids))(model), exact) <= TOLERANCE


def test_an_earlier_export_is_replaced_and_another_folder_is_not(
    small: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    model = load_pretrained(small)
    draw_adapters(model, rng, targets=["q_proj"])
    mine, ours = tmp_path / "mine", tmp_path / "adapter"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (mine / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="not written by an export"):
        save_lora(model, mine)
    assert (mine / "notes.txt").read_text() == "mine"
    for _ in range(2):
        save_lora(model, ours)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in ours.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mine"]
