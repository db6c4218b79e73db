"""Adapters that cannot be taken whole are refused, in one sentence."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ogpsa_jax.errors import InputError
from ogpsa_jax.models import LoraParam, load_lora, load_pretrained


def with_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def with_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


def tear(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


PREFIX = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_config(peft_type="IA3"), "adapter_config.json: peft_type is 'IA3'"),
        (with_config(bias="all"), "bias is 'all'"),
        (with_config(use_dora=True), "use_dora is True"),
        (with_config(use_rslora=True), "use_rslora is True"),
        (with_config(rank_pattern={"q_proj": 4}), "rank_pattern"),
        (with_config(alpha_pattern={"q_proj": 4}), "alpha_pattern"),
        (with_config(modules_to_save=["lm_head"]), "modules_to_save"),
        (with_config(layers_to_transform=[0]), "layers_to_transform"),
        (with_config(unheard_of=1), "unheard_of"),
        (with_config(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (with_config(r="two"), "r is 'two'"),
        (with_config(lora_alpha=None), "lora_alpha is None"),
        (with_config(lora_dropout=1.5), "lora_dropout is 1.5"),
        (with_config(r=3), r"lora_A.weight has shape \[2, 32\].*\[3, 32\]"),
        (with_config(target_modules=["q_proj", "k_proj"]), r"k_proj.lora_A.weight is missing"),
        (
            with_tensors(lambda t: t.pop(f"{PREFIX}.lora_B.weight")),
            "q_proj.lora_B.weight is missing",
        ),
        (with_tensors(lambda t: t.update(more=np.ones(1, np.float32))), "tensor more is not part"),
        (with_tensors(lambda t: t.clear()), "adapters of none of q_proj"),
        (tear, "adapter_model.safetensors: not a whole safetensors file"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            "adapter_model.safetensors",
        ),
    ],
)
def test_adapters_that_cannot_be_taken_whole_are_refused(
    spoil: Callable[[Path], Any], words: str, small: Path, tmp_path: Path
) -> None:
    model = load_pretrained(small)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "q_proj"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{part}.weight": np.ones(
            (2, 32) if part == "A" else (32, 2), np.float32
        )
        for i in range(2)
        for part in "AB"
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    spoil(tmp_path)
    with pytest.raises(InputError, match=words) as refusal:
        load_lora(model, tmp_path)
    assert "\n" not in str(refusal.value)
    assert not nnx.to_flat_state(nnx.state(model, LoraParam))
