"""Decoders of the Llama and Qwen families in Flax NNX: import, export, LoRA, generation."""

from ogpsa_jax.models.config import DecoderConfig, RopeConfig
from ogpsa_jax.models.decoder import Decoder
from ogpsa_jax.models.generation import generate
from ogpsa_jax.models.lora import LoraParam, add_lora, load_lora, merge_lora, save_lora
from ogpsa_jax.models.merge import merge_pretrained
from ogpsa_jax.models.names import to_huggingface
from ogpsa_jax.models.pretrained import abstract_decoder, load_pretrained, save_pretrained
from ogpsa_jax.models.sharding import ShardingRules, param_shardings

__all__ = [
    "Decoder",
    "DecoderConfig",
    "LoraParam",
    "RopeConfig",
    "ShardingRules",
    "abstract_decoder",
    "add_lora",
    "generate",
    "load_lora",
    "load_pretrained",
    "merge_lora",
    "merge_pretrained",
    "param_shardings",
    "save_lora",
    "save_pretrained",
    "to_huggingface",
]
