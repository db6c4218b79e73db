"""Decoders of the Llama and Qwen families in Flax NNX: import, export, generation."""

from ogpsa_jax.models.config import DecoderConfig, RopeConfig
from ogpsa_jax.models.decoder import Decoder
from ogpsa_jax.models.generation import generate
from ogpsa_jax.models.names import from_huggingface, to_huggingface
from ogpsa_jax.models.pretrained import abstract_decoder, load_pretrained, save_pretrained
from ogpsa_jax.models.sharding import ShardingRules, param_shardings

__all__ = [
    "Decoder",
    "DecoderConfig",
    "RopeConfig",
    "ShardingRules",
    "abstract_decoder",
    "from_huggingface",
    "generate",
    "load_pretrained",
    "param_shardings",
    "save_pretrained",
    "to_huggingface",
]
