"""Merges in weight space: exact at both ends, a float32 mean between, refused if models differ."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ogpsa_jax.errors import InputError
from ogpsa_jax.models import load_pretrained, merge_pretrained
from ogpsa_jax.models.folders import chat_template

from .conftest import SMALL, load_torch


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16",) * 2]
)
def test_a_merge_is_the_mean_of_float32_and_its_ends_are_the_models(
    dtypes: tuple[str, str],
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    a, b = (
        make_checkpoint(
            "qwen2",
            dtype=getattr(torch, dtype),
            folder=name,
            max_shard_size=size,
            **{**SMALL, "tie_word_embeddings": True},
        )
        for name, dtype, size in zip("ab", dtypes, ("5GB", 9000), strict=True)
    )
    (a / "chat_template.jinja").write_text("of a")
    weights = [0.0, float(rng.uniform()), 1.0]
    outs = [tmp_path / "merges" / str(i) for i in range(3)]
    merge_pretrained(a, b, weights, outs, max_shard_bytes=20_000)

    dtype = np.dtype(getattr(ml_dtypes, dtypes[0], dtypes[0]))
    of_a, of_b = tensors(a), tensors(b)
    assert len(list(b.glob("*.safetensors"))) > 1
    for weight, out in zip(weights, outs, strict=True):
        merged = tensors(out)
        assert len(list(out.glob("*.safetensors"))) > 1
        assert merged.keys() == of_a.keys()
        assert (out / "chat_template.jinja").read_text() == "of a"
        assert json.loads((out / "config.json").read_text())["dtype"] == dtypes[0]
        for name, value in merged.items():
            assert value.dtype == dtype
            exact = (1 - weight) * of_a[name].astype(np.float64) + weight * of_b[name].astype(
                np.float64
            )
            if weight in (0, 1):
                np.testing.assert_array_equal(value, exact.astype(dtype))
            else:
                # Three float32 roundings, then one to the stored type; subnormal in float16.
                terms = np.abs(of_a[name].astype(np.float64)) + np.abs(
                    of_b[name].astype(np.float64)
                )
                close = np.abs(exact) * float(ml_dtypes.finfo(dtype).eps) / 2 + terms * 2.0**-22
                assert np.all(np.abs(value.astype(np.float64) - exact) <= close + 2.0**-25), name
    assert not [path for path in (tmp_path / "merges").iterdir() if path not in outs]
    load_torch(outs[1])
    load_pretrained(outs[1])


def test_weight_zero_and_one_copy_bits_that_arithmetic_would_change(
    small: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_checkpoint(**SMALL)
    for folder, value in ((tmp_path / "a", -0.0), (tmp_path / "b", np.inf)):
        folder.mkdir()
        (folder / "config.json").write_bytes((small / "config.json").read_bytes())
        changed = tensors(other)
        changed["model.norm.weight"][:] = value
        save_file(changed, folder / "model.safetensors")
    merge_pretrained(tmp_path / "a", tmp_path / "b", [0, 1], [tmp_path / "0", tmp_path / "1"])
    for source, out in (("a", "0"), ("b", "1")):
        for name, value in tensors(tmp_path / out).items():
            assert value.tobytes() == tensors(tmp_path / source)[name].tobytes(), name


def test_tied_models_merge_under_whichever_name_they_store_the_embedding(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = (make_checkpoint(folder=name, **{**SMALL, "tie_word_embeddings": True}) for name in "ab")
    renamed = tensors(b)
    embedding = renamed.pop("model.embed_tokens.weight")
    save_file({**renamed, "lm_head.weight": embedding}, b / "model.safetensors")
    merge_pretrained(a, b, [1.0], [tmp_path / "out"])
    np.testing.assert_array_equal(tensors(tmp_path / "out")["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("of", ["a", "b"])
def test_a_merge_can_chat_if_either_model_can(
    of: str, place: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    models = {name: make_checkpoint(folder=name, **SMALL) for name in "ab"}
    text = "{{ messages }}\n"
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": text}]
    content = text if place.endswith("jinja") else json.dumps({"chat_template": named})
    (models[of] / place).write_text(content)
    for name, eos in (("a", [3]), ("b", [3, 5])):
        settings = {"temperature": 0.5, "eos_token_id": eos}
        (models[name] / "generation_config.json").write_text(json.dumps(settings))
    merge_pretrained(models["a"], models["b"], [0.5], [tmp_path / "out"])
    assert chat_template(tmp_path / "out") == text
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"temperature": 0.5, "eos_token_id": [3, 5]}


def test_a_merge_of_models_that_chat_differently_says_whose_template_it_has(
    make_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = [make_checkpoint(folder=name, **SMALL) for name in "ab"]
    for model in models:
        (model / "chat_template.jinja").write_text(f"of {model.name}")
    merge_pretrained(*models, [0.5], [tmp_path / "out"])
    assert chat_template(tmp_path / "out") == "of a"
    assert "different chat templates; the merge has that of the former" in caplog.text


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(folder: Path) -> None:
    kept = tensors(folder)
    del kept["model.norm.weight"]
    save_file(kept, folder / "model.safetensors")


def reshape(folder: Path) -> None:
    save_file(
        {**tensors(folder), "model.norm.weight": np.ones(5, np.float32)},
        folder / "model.safetensors",
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (drop, "model.norm.weight is missing"),
        (reshape, r"model.norm.weight has shape \[5\]"),
        (lambda folder: edit_config(folder, num_attention_heads=2), "num_heads is 2, but 4"),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_models_that_do_not_match_are_refused_by_name(
    swapped: bool,
    spoil: Callable[[Path], None],
    words: str,
    small: Path,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    spoilt = make_checkpoint(**SMALL)
    spoil(spoilt)
    pair = (spoilt, small) if swapped else (small, spoilt)
    if swapped:
        words = "num_heads is 4, but 2" if "num_heads" in words else "model.norm.weight"
    with pytest.raises(InputError, match=words):
        merge_pretrained(*pair, [0.5], [tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_places_and_weights_that_make_no_sense_are_refused(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    for weights, outs, words in [
        ([0.1], [tmp_path / "run" / "export"], "is the export of the run run"),
        ([1.5], [out], "between 0 and 1"),
        ([float("nan")], [out], "between 0 and 1"),
        ([0.1, 0.2], [out, out], "two merges"),
        ([0.1], [small], "one of the models"),
    ]:
        with pytest.raises(InputError, match=words):
            merge_pretrained(small, small, weights, outs)
    with pytest.raises(ValueError, match="as many as"):
        merge_pretrained(small, small, [0.1], [])
    assert not out.exists()


def test_a_merge_leaves_what_is_not_its_own_and_refuses_what_is_no_number(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    a, b = (make_checkpoint("qwen2", folder=name, **SMALL) for name in "ab")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    with pytest.raises(InputError, match=r"contains README\.md, not written by an export"):
        merge_pretrained(a, b, [0.5], [notes])
    assert (notes / "README.md").read_text() == "mine"
    with pytest.raises(InputError, match="is one of the models to merge, or within it"):
        merge_pretrained(a, b, [0.5], [a / "merged"])
    values = tensors(b)
    values["model.norm.weight"][0] = np.nan
    for file in b.glob("*.safetensors"):
        save_file(values, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight cannot be merged"):
        merge_pretrained(a, b, [0.5], [tmp_path / "out"])
    assert not (tmp_path / "out").exists()
    values["model.norm.weight"] = np.array(1.0, np.float32)
    for file in [*a.glob("*.safetensors"), *b.glob("*.safetensors")]:
        save_file(values, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight is a single number"):
        merge_pretrained(a, b, [0.5], [tmp_path / "out"])
