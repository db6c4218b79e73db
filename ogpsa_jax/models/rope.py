"""Rotary position embeddings (arXiv 2104.09864), tables computed on the fly in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ogpsa_jax.models.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of dimensions.

    In float32 throughout, as transformers computes it: an ulp here is 1e-4 radians at position
    1000.

    Args:
      config: kind and scaling.
      head_dim: size of a head, even.

    Returns:
      float32 [head_dim / 2], radians per position.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.power(np.float32(config.theta), exponents)
    if config.rope_type == "linear":
        return frequencies / np.float32(config.factor)
    if config.rope_type == "llama3":
        return _llama3(frequencies, config)
    return frequencies


def _llama3(frequencies: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Stretch long wavelengths by the factor, keep short ones, and blend in between."""
    length = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    stretched = frequencies / np.float32(config.factor)
    smooth = (np.float32(length) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * stretched + smooth * frequencies
    result = np.where(wavelengths > length / low, stretched, frequencies)
    between = (wavelengths <= length / low) & (wavelengths >= length / high)
    return np.where(between, blended, result).astype(np.float32)


def rope_table(
    config: RopeConfig, head_dim: int, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for :func:`apply_rope`.

    Args:
      config: kind and scaling.
      head_dim: size of a head.
      positions: int32 [batch, length].

    Returns:
      Two float32 arrays [batch, length, 1, head_dim / 2].
    """
    frequencies = jnp.asarray(inverse_frequencies(config, head_dim))
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(heads: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate dimension i against dimension i + head_dim / 2 (the layout of Hugging Face weights).

    Args:
      heads: [batch, length, heads, head_dim].
      table: of :func:`rope_table`.

    Returns:
      Like ``heads``; computed in float32.
    """
    cos, sin = table
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(heads.dtype)
