"""The architecture of a decoder, and how Hugging Face's ``config.json`` spells it.

One description covers Llama 2/3.x, Mistral without a sliding window, Qwen2/2.5 and Qwen3 (dense):
they differ in biases, query/key norms, tied embeddings and the kind of rotary embedding only.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json

RopeType = Literal["default", "linear", "llama3"]

# model_type -> (architecture, what a config.json means by leaving a key out)
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": ("Qwen2ForCausalLM", {"num_key_value_heads": 32}),
    "qwen3": ("Qwen3ForCausalLM", {"num_key_value_heads": 32, "head_dim": 128}),
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      rope_type: ``default`` (RoFormer, arXiv 2104.09864), ``linear`` (position interpolation, arXiv
        2306.15595) or ``llama3`` (the frequency-dependent scaling of Llama 3.1).
      theta: base of the frequencies.
      factor: by how much the context was stretched; linear and llama3.
      low_freq_factor: llama3 only.
      high_freq_factor: llama3 only.
      original_max_position_embeddings: context length before stretching; llama3 only.
    """

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a :class:`~ogpsa_jax.models.decoder.Decoder`; sizes are counts of elements.

    ``model_type`` names the Hugging Face family the weights are exported as. ``weights_dtype`` is
    the type a checkpoint stores its weights in (``None``: whatever the parameters have).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "llama"
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    weights_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.model_type not in _FAMILIES:
            raise ValueError(f"model_type must be among {list(_FAMILIES)}, got {self.model_type}")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}")

    def to_huggingface(self) -> dict[str, Any]:
        """The ``config.json`` that transformers and vLLM read.

        Raises:
          ValueError: the family cannot express this combination of biases and norms.
        """
        expected = _flags(self.model_type, self.qkv_bias and self.model_type != "qwen2")
        if self.model_type == "llama":
            expected["mlp_bias"] = self.mlp_bias
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"model_type={self.model_type!r} has {name}={value}, got {getattr(self, name)}"
                )
        rope: dict[str, Any] = {"rope_type": self.rope.rope_type, "rope_theta": self.rope.theta}
        if self.rope.rope_type != "default":
            rope["factor"] = self.rope.factor
        if self.rope.rope_type == "llama3":
            rope["low_freq_factor"] = self.rope.low_freq_factor
            rope["high_freq_factor"] = self.rope.high_freq_factor
            rope["original_max_position_embeddings"] = self.rope.original_max_position_embeddings
        config: dict[str, Any] = {
            "architectures": [_FAMILIES[self.model_type][0]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            # Readers older than transformers 5 look here.
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.rope_type == "default" else rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": True,
        }
        if self.model_type == "mistral":
            config["sliding_window"] = None
        if self.model_type in ("llama", "qwen3"):
            config["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            config["mlp_bias"] = self.mlp_bias
        if self.model_type in ("qwen2", "qwen3"):
            config["use_sliding_window"] = False
        if self.bos_token_id is not None:
            config["bos_token_id"] = self.bos_token_id
        if self.eos_token_ids:
            ids = self.eos_token_ids
            config["eos_token_id"] = ids[0] if len(ids) == 1 else list(ids)
        if self.pad_token_id is not None:
            config["pad_token_id"] = self.pad_token_id
        return config


def _flags(model_type: str, attention_bias: bool) -> dict[str, bool]:
    """Which biases and norms a family has; Qwen2's are fixed, the others' are set by a key."""
    return {
        "qkv_bias": attention_bias or model_type == "qwen2",
        "output_bias": attention_bias and model_type in ("llama", "qwen3"),
        "mlp_bias": False,
        "qk_norm": model_type == "qwen3",
    }


def read_config(folder: Path) -> DecoderConfig:
    """The architecture described by a Hugging Face folder.

    Stop tokens are those of ``generation_config.json`` where it names any, else of ``config.json``.

    Args:
      folder: contains ``config.json`` and perhaps ``generation_config.json``.

    Raises:
      InputError: a file is missing or malformed, or asks for something the decoder does not have.
    """
    path = folder / "config.json"
    raw = read_json(path, "a Hugging Face model folder needs it whole")
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    return _Reader(path, raw).decoder_config(generation)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads fields of one ``config.json`` and refuses by file and field."""

    path: Path
    raw: dict[str, Any]

    def refuse(self, field: str, expected: str) -> InputError:
        return InputError(f"{self.path}: {field} is {self.raw.get(field)!r}, but {expected}.")

    def number(self, field: str, default: float | None = None) -> float:
        value = self.raw.get(field)
        if value is None:
            value = default
        if value is None:
            raise InputError(f"{self.path}: {field} is missing; a decoder needs it.")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self.refuse(field, "a positive number was expected")
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.number(field, default)
        if value != int(value):
            raise self.refuse(field, "a whole number was expected")
        return int(value)

    def decoder_config(self, generation: dict[str, Any]) -> DecoderConfig:
        raw = self.raw
        model_type = raw.get("model_type")
        if model_type not in _FAMILIES:
            raise self.refuse("model_type", f"supported are {', '.join(_FAMILIES)}")
        architecture, defaults = _FAMILIES[model_type]
        if raw.get("architectures") not in (None, [architecture]):
            raise self.refuse("architectures", f"for {model_type} only {architecture} is supported")
        self._refuse_unsupported(model_type, defaults)

        num_heads = self.integer("num_attention_heads")
        hidden_size = self.integer("hidden_size")
        num_kv_heads = self.integer(
            "num_key_value_heads", defaults.get("num_key_value_heads", num_heads)
        )
        if num_heads % num_kv_heads:
            raise self.refuse("num_key_value_heads", f"it must divide the {num_heads} heads")
        head_dim = self.integer("head_dim", defaults.get("head_dim", hidden_size // num_heads))
        if head_dim % 2:
            raise InputError(f"{self.path}: the head size is {head_dim}, but it must be even.")
        flags = _flags(model_type, bool(raw.get("attention_bias", False)))
        if model_type == "llama":
            flags["mlp_bias"] = bool(raw.get("mlp_bias", False))
        dtype = raw.get("dtype", raw.get("torch_dtype"))
        return DecoderConfig(
            vocab_size=self.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self.integer("intermediate_size"),
            num_layers=self.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            model_type=model_type,
            rope=self._rope(),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            max_position_embeddings=self.integer("max_position_embeddings", 2048),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=self.number("initializer_range", 0.02),
            bos_token_id=_first(generation, raw, "bos_token_id"),
            eos_token_ids=_token_ids(_first(generation, raw, "eos_token_id")),
            pad_token_id=_first(generation, raw, "pad_token_id"),
            weights_dtype=dtype if dtype in ("float32", "float16", "bfloat16") else None,
            **flags,
        )

    def _refuse_unsupported(self, model_type: str, defaults: dict[str, Any]) -> None:
        raw = self.raw
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise self.refuse("hidden_act", "only silu is supported")
        if raw.get("quantization_config") is not None:
            raise InputError(
                f"{self.path}: quantization_config is set, but only float32, float16 and bfloat16 "
                "weights are supported; use the unquantised checkpoint."
            )
        if raw.get("attention_dropout", 0.0):
            raise self.refuse(
                "attention_dropout", "dropout in attention is not supported: set it to 0"
            )
        if raw.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.refuse("partial_rotary_factor", "only 1.0 is supported")
        layer_types = set(raw.get("layer_types") or ())
        if layer_types - {"full_attention"}:
            raise self.refuse("layer_types", "only full_attention is supported")
        window = raw.get("sliding_window", defaults.get("sliding_window"))
        in_use = raw.get("use_sliding_window", model_type == "mistral")
        # A window as long as the context never hides anything.
        if window and in_use and window < self.integer("max_position_embeddings", 2048):
            raise InputError(
                f"{self.path}: sliding_window is {window}, shorter than max_position_embeddings, "
                "but sliding-window attention is not supported; use a model with full attention."
            )

    def _rope(self) -> RopeConfig:
        """``rope_parameters`` since transformers 5; ``rope_scaling`` and ``rope_theta`` before."""
        field = "rope_parameters" if self.raw.get("rope_parameters") else "rope_scaling"
        rope = self.raw.get(field) or {}
        if not isinstance(rope, dict):
            raise self.refuse(field, "an object was expected")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "linear", "llama3"):
            raise self.refuse(field, "supported rope types are default, linear and llama3")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise self.refuse(field, "only a partial_rotary_factor of 1.0 is supported")
        inner = _Reader(self.path, {**self.raw, **rope})
        theta = float(inner.number("rope_theta", 10000.0))
        if rope_type == "default":
            return RopeConfig(theta=theta)
        factor = float(inner.number("factor"))
        if rope_type == "linear":
            return RopeConfig("linear", theta, factor)
        config = RopeConfig(
            "llama3",
            theta,
            factor,
            float(inner.number("low_freq_factor")),
            float(inner.number("high_freq_factor")),
            inner.integer("original_max_position_embeddings"),
        )
        if not config.low_freq_factor < config.high_freq_factor < math.inf:
            raise self.refuse(field, "low_freq_factor must be below high_freq_factor")
        return config


def _first(generation: dict[str, Any], config: dict[str, Any], field: str) -> Any:
    value = generation.get(field)
    return config.get(field) if value is None else value


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    found = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in found):
        raise InputError(f"eos_token_id: expected token ids, found {value!r}; fix the config.")
    return tuple(found)
