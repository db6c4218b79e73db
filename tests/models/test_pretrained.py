"""Checkpoints come in whole or not at all, straight to their places, and go out as they were."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

from ogpsa_jax.errors import InputError
from ogpsa_jax.models import load_pretrained, param_shardings, save_pretrained
from ogpsa_jax.models.safetensors_files import CheckpointReader

from .conftest import SMALL, load_torch, relative_error
from .test_parity import CASES, TOLERANCE

TIED = {**SMALL, "tie_word_embeddings": True}
EMBEDDING, UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [10_000, 5_000_000])
def test_a_round_trip_changes_no_bit(
    dtype: str, shard_bytes: int, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint(dtype=getattr(torch, dtype), max_shard_size=shard_bytes, **SMALL)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    save_pretrained(load_pretrained(source), tmp_path / "export", max_shard_bytes=shard_bytes)
    files = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert (
        (len([name for name in files if name.endswith(".safetensors")]) > 1)
        == ("model.safetensors.index.json" in files)
        == (shard_bytes == 10_000)
    )
    assert_same_bits(tensors(tmp_path / "export"), tensors(source))
    assert (tmp_path / "export" / "chat_template.jinja").read_text() == "{{ messages }}"
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((f / name).read_text()) for f in (tmp_path / "export", source))
        assert ours == theirs
    state = load_torch(tmp_path / "export", "auto").state_dict()
    for name, value in load_torch(source, "auto").state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize(("family", "rope", "fixed"), CASES)
def test_a_model_without_a_source_exports_a_config_that_transformers_understands(
    family: str,
    rope: str,
    fixed: dict,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    source = make_checkpoint(family, rope, **fixed)
    model = load_pretrained(source)
    model.source = None
    save_pretrained(model, tmp_path / "export")
    ids = torch.tensor(rng.integers(0, model.config.vocab_size, (2, 40)))
    with torch.no_grad():
        logits, exact = (load_torch(f)(ids).logits for f in (tmp_path / "export", source))
    assert torch.equal(logits, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_can_be_cast(dtype: str, small: Path, tmp_path: Path) -> None:
    save_pretrained(load_pretrained(small), tmp_path / "export", dtype=dtype)
    cast = {name: torch.tensor(value) for name, value in tensors(small).items()}
    for name, value in load_torch(tmp_path / "export", "auto").state_dict().items():
        assert torch.equal(value, cast[name].to(getattr(torch, dtype))), name
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == dtype
    with pytest.raises(ValueError, match="float8"):
        save_pretrained(load_pretrained(small), tmp_path / "export", dtype="float8")


def test_tied_embeddings_are_found_under_either_name_or_both(
    make_checkpoint: Callable[..., Path],
) -> None:
    source = make_checkpoint(**TIED)
    stored = tensors(source)
    embedding = stored.pop(EMBEDDING)
    assert UNEMBEDDING not in stored
    for names in ([EMBEDDING], [UNEMBEDDING], [EMBEDDING, UNEMBEDDING]):
        save_file({**stored, **dict.fromkeys(names, embedding)}, source / "model.safetensors")
        model = load_pretrained(source)
        assert model.lm_head is None
        np.testing.assert_array_equal(model.embed_tokens.embedding[...], embedding)
    save_file(
        {**stored, EMBEDDING: embedding, UNEMBEDDING: embedding + 1}, source / "model.safetensors"
    )
    with pytest.raises(InputError, match=r"lm_head.weight differs.*tie_word_embeddings"):
        load_pretrained(source)


@pytest.mark.parametrize(
    "shape",
    [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 4}],
    ids=lambda shape: "-".join(f"{axis}{size}" for axis, size in shape.items()),
)
def test_a_checkpoint_loads_straight_into_shardings_with_equal_logits(
    shape: dict[str, int], small: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape)
    )
    whole: list[str] = []
    read = CheckpointReader.read

    def spy(reader: CheckpointReader, name: str, index: Any = None) -> np.ndarray:
        value = read(reader, name, index)
        if value.ndim == 2 and value.shape == reader.shape(name):
            whole.append(name)
        return value

    monkeypatch.setattr(CheckpointReader, "read", spy)
    model = load_pretrained(small, dtype="float32", mesh=mesh)
    assert not whole, "matrices are read in blocks"
    monkeypatch.undo()
    single = load_pretrained(small, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(single))
    shardings = dict(nnx.to_flat_state(param_shardings(model, mesh, model.placement.rules)))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        assert value.sharding.is_equivalent_to(shardings[path].get_value(), value.ndim), path
    ids = rng.integers(0, model.config.vocab_size, (8, 12)).astype(np.int32)
    logits = nnx.jit(lambda model: model(ids))(model)
    assert relative_error(logits, single(ids)) <= TOLERANCE


def test_import_holds_one_tensor_beside_the_parameters(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(**{**SMALL, "num_hidden_layers": 12, "vocab_size": 512})
    sizes = [value.nbytes for value in tensors(source).values()]
    live = 0
    before = sum(array.nbytes for array in jax.live_arrays())
    read = CheckpointReader.read

    def spy(reader: CheckpointReader, name: str, index: Any = None) -> np.ndarray:
        nonlocal live
        live = max(live, sum(array.nbytes for array in jax.live_arrays()) - before)
        return read(reader, name, index)

    monkeypatch.setattr(CheckpointReader, "read", spy)
    load_pretrained(source)  # compiled, so that only tensors are counted below
    live = 0
    tracemalloc.start()
    try:
        model = load_pretrained(source)
        host_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    total = sum(sizes)
    assert sum(p.get_value().nbytes for _, p in nnx.to_flat_state(nnx.state(model))) == total
    assert total / 2 < live <= total + 2 * max(sizes)
    assert host_peak < total / 2  # Python objects of the model included


def edit(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        stored = tensors(folder)
        change(stored)
        save_file(stored, folder / "model.safetensors")

    return spoil


def configured(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        kept = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in kept.items() if v != "absent"}))

    return spoil


def tear(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index(**where: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        stored = folder / "model.safetensors"
        names = load_file(stored).keys()
        stored.rename(folder / "model-1.safetensors")
        weight_map = {**dict.fromkeys(names, "model-1.safetensors"), **where}
        text = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (edit(lambda t: t.pop("model.norm.weight")), "model.norm.weight is missing"),
        (edit(lambda t: t.update(extra=np.ones(3, np.float32))), "tensor extra is not part"),
        (
            edit(lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)})),
            r"model.norm.weight has shape \[3\].*\[32\]",
        ),
        (
            edit(lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)})),
            "model.norm.weight has type I8",
        ),
        (tear, "model.safetensors: not a whole safetensors file"),
        (index(more="model-2.safetensors"), "names the file model-2.safetensors, which is missing"),
        (index(more="model-1.safetensors"), "tensor more is missing"),
        (index(more="../model.safetensors"), "must be a file name within the folder"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "config.json").unlink(), "config.json: the file is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object, found list"),
        (configured(model_type="gemma2"), "model_type is 'gemma2', but supported are llama"),
        (configured(architectures=["LlamaForSequenceClassification"]), "architectures"),
        (configured(hidden_size="absent"), "hidden_size is missing"),
        (configured(hidden_size="big"), "hidden_size is 'big', but a positive number"),
        (configured(num_hidden_layers=1.5), "num_hidden_layers is 1.5, but a whole number"),
        (configured(num_key_value_heads=3), "num_key_value_heads is 3, but it must divide"),
        (configured(head_dim=7), "head size is 7, but it must be even"),
        (configured(hidden_act="gelu"), "hidden_act is 'gelu', but only silu"),
        (configured(quantization_config={"bits": 4}), "quantization_config is set"),
        (configured(attention_dropout=0.1), "attention_dropout is 0.1"),
        (configured(rope_parameters={"rope_type": "yarn"}), "default, linear and llama3"),
        (configured(rope_parameters={"rope_type": "linear"}), "factor is missing"),
        (
            configured(model_type="mistral", architectures=None, sliding_window=16),
            "sliding_window is 16, shorter than max_position_embeddings",
        ),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_sentence(
    spoil: Callable[[Path], Any], words: str, make_checkpoint: Callable[..., Path]
) -> None:
    folder = make_checkpoint(**SMALL)
    spoil(folder)
    with pytest.raises(InputError, match=words) as refusal:
        load_pretrained(folder)
    sentence = str(refusal.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_what_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(InputError, match="not a folder"):
            load_pretrained(path)


def test_an_export_that_fails_leaves_the_earlier_one(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = load_pretrained(small), tmp_path / "export"
    save_pretrained(model, out)
    model.norm.scale.set_value(model.norm.scale[...] + 1)
    with monkeypatch.context() as patched:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patched.setattr("ogpsa_jax.models.safetensors_files.CheckpointWriter.finish", full)
        with pytest.raises(OSError, match="No space"):
            save_pretrained(model, out)
    assert_same_bits(tensors(out), tensors(small))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    save_pretrained(model, out)
    np.testing.assert_array_equal(
        tensors(out)["model.norm.weight"], tensors(small)["model.norm.weight"] + 1
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(InputError, match="not written by an export"):
        save_pretrained(model, tmp_path / "mine")
