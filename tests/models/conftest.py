"""Random tiny checkpoints of every supported family, made by transformers itself."""

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


# One small architecture for what does not depend on it, so that its programs are compiled once.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def new_rng() -> np.random.Generator:
    """Freshly seeded; pytest shows the seed when a test fails."""
    seed = secrets.randbits(32)
    print(f"seed: {seed}")
    return np.random.default_rng(seed)


def draw_checkpoint(
    folder: Path,
    rng: np.random.Generator,
    family: str = "llama",
    rope: str = "default",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    **fixed: Any,
) -> Path:
    """Draw an architecture and weights, and save them as transformers does."""
    kv_heads = int(rng.choice([1, 2]))
    settings = {
        "vocab_size": int(rng.integers(60, 90)),
        "hidden_size": int(rng.choice([24, 36, 48])),
        "intermediate_size": int(rng.integers(30, 60)),
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": kv_heads * int(rng.choice([1, 2, 3])),
        "num_key_value_heads": kv_heads,
        "head_dim": int(rng.choice([4, 8, 12])),
        "max_position_embeddings": 64,
        "rope_parameters": {**ROPES[rope], "rope_theta": float(rng.choice([1e4, 5e5, 1e6]))},
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
        config.hidden_size = config.num_attention_heads * config.head_dim
        del config.head_dim
    torch.manual_seed(int(rng.integers(2**31)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1)
            if "norm" in name:
                parameter.add_(1.0)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load_torch(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """What transformers makes of a folder."""
    # Attention by default: the eager one takes its softmax in float32 even of float64.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def relative_error(value: Any, exact: Any) -> float:
    """Largest deviation in units of the largest exact entry."""
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    assert value.shape == exact.shape
    return float(np.abs(value - exact).max() / np.abs(exact).max())


@pytest.fixture
def rng() -> np.random.Generator:
    return new_rng()


@pytest.fixture
def make_checkpoint(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Path]:
    """As :func:`draw_checkpoint`, into a folder of the test's own."""

    def make(*arguments: Any, folder: str = "checkpoint", **options: Any) -> Path:
        return draw_checkpoint(tmp_path / folder, rng, *arguments, **options)

    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the small architecture; read only."""
    return draw_checkpoint(tmp_path_factory.mktemp("small") / "llama", new_rng(), **SMALL)
