"""Random tiny checkpoints of every supported family, made by transformers itself."""

import dataclasses
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


@dataclasses.dataclass
class Checkpoint:
    """A folder and the torch model whose weights it holds."""

    folder: Path
    torch_model: transformers.PreTrainedModel


@pytest.fixture
def rng() -> np.random.Generator:
    """Freshly seeded; pytest shows the seed when a test fails."""
    seed = secrets.randbits(32)
    print(f"seed: {seed}")
    return np.random.default_rng(seed)


@pytest.fixture
def make_checkpoint(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Checkpoint]:
    """Draws an architecture and weights, and saves them as transformers does."""

    def make(
        family: str = "llama",
        rope: str = "default",
        dtype: torch.dtype = torch.float32,
        max_shard_size: str | int = "5GB",
        folder: str = "checkpoint",
        **fixed: Any,
    ) -> Checkpoint:
        kv_heads = int(rng.choice([1, 2]))
        settings = {
            "vocab_size": int(rng.integers(60, 90)),
            "hidden_size": int(rng.choice([24, 32])),
            "intermediate_size": int(rng.integers(30, 60)),
            "num_hidden_layers": int(rng.integers(2, 4)),
            "num_attention_heads": kv_heads * int(rng.choice([1, 2, 3])),
            "num_key_value_heads": kv_heads,
            "head_dim": int(rng.choice([4, 8, 12])),
            "max_position_embeddings": 64,
            "rope_parameters": {
                **ROPES[rope],
                "rope_theta": float(rng.choice([1e4, 5e5, 1e6])),
            },
            "rms_norm_eps": float(rng.choice([1e-5, 1e-6])),
            "tie_word_embeddings": bool(rng.integers(2)),
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if family == "mistral":
            settings["sliding_window"] = None
        config = FAMILIES[family](**{**settings, **fixed})
        # Qwen2 derives the size of its heads.
        if family == "qwen2":
            config.hidden_size = config.num_attention_heads * settings["head_dim"]
            del config.head_dim
        torch.manual_seed(int(rng.integers(2**31)))
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.1)
                if "norm" in name:
                    parameter.add_(1.0)
        model = model.to(dtype).eval()
        path = tmp_path / folder
        model.save_pretrained(path, max_shard_size=max_shard_size)
        return Checkpoint(path, model)

    return make
