"""cuDNN's fused attention against XLA's, both judged by float32. On an NVIDIA GPU:

JAX_PLATFORMS=cuda python -m pytest tests/models/test_fused_attention.py
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ogpsa_jax.models import Decoder, DecoderConfig, generate

from .conftest import new_rng

FUSED = "fmha"  # in the name of the compiled program's call of cuDNN
on_gpu = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="fused attention needs a GPU (JAX_PLATFORMS=cuda)"
)
CASES = [
    # head size, heads, key/value heads, length, layers' recomputation
    (128, 8, 2, 256, "full"),  # Qwen2.5, Llama 3
    (64, 4, 4, 130, "none"),
    (96, 6, 2, 62, "dots"),
    (8, 8, 4, 64, "none"),  # stories260k
    (16, 2, 1, 6, "full"),
    (64, 4, 2, 2060, "full"),  # in blocks of queries
]


def decoder(config: DecoderConfig, **options: Any) -> Decoder:
    return Decoder(config, rngs=nnx.Rngs(0), **options)


def architecture(head_dim: int, heads: int, kv_heads: int, **options: Any) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=0.2,
        **options,
    )


def compiled(model: Decoder, ids: np.ndarray, segments: np.ndarray) -> tuple[Callable, nnx.State]:
    """Logits, and gradients of their cross-entropy, as one program; and its parameters."""
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(jnp.asarray(ids), segment_ids=jnp.asarray(segments))
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_probs, jnp.asarray(ids)[:, 1:, None], axis=-1)[..., 0]
        same = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        return -jnp.sum(picked * same) / same.sum(), logits

    return jax.jit(jax.grad(loss, has_aux=True)).lower(params).compile(), params


def distances(value: Any, exact: Any) -> dict[str, float]:
    """The norm of each leaf's deviation, in units of the norm of the exact one."""

    def distance(a: jax.Array, b: jax.Array) -> float:
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(distance, value, exact))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


@on_gpu
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads", "length", "remat"), CASES)
def test_logits_and_gradients_are_as_exact_as_the_unfused_ones(
    head_dim: int, heads: int, kv_heads: int, length: int, remat: str
) -> None:
    rng = new_rng()
    config = architecture(head_dim, heads, kv_heads, qk_norm=bool(rng.integers(2)))
    ids = rng.integers(0, config.vocab_size, (4, length)).astype(np.int32)
    # Rows of one document, of several, and padded on either side.
    segments = np.ones((4, length), np.int32)
    segments[1, length // 3 :], segments[1, length // 2 :] = 2, 3
    segments[2, length - length // 3 :] = 0
    segments[3, : length // 3] = 0

    results = {}
    for name, dtype, attention in (
        ("exact", "float32", "auto"),
        ("unfused", "bfloat16", "xla"),
        ("fused", "bfloat16", "auto"),
    ):
        model = decoder(config, dtype=dtype, attention=attention, remat=remat)
        program, params = compiled(model, ids, segments)
        assert (FUSED in program.as_text()) == (name == "fused")
        gradients, logits = program(params)
        results[name] = {"logits": logits[segments > 0], "gradients": gradients}
    fused = distances(results["fused"], results["exact"])
    unfused = distances(results["unfused"], results["exact"])
    worst = max(fused, key=lambda name: fused[name] / unfused[name])
    print(f"{worst}: fused {fused[worst]:.1e}, unfused {unfused[worst]:.1e}")
    assert max(unfused.values()) < 0.1
    for name in fused:
        assert fused[name] <= 2 * unfused[name], name


@on_gpu
@pytest.mark.parametrize(("dtype", "length"), [("float32", 64), ("bfloat16", 63)])
def test_what_the_kernel_cannot_do_is_left_to_xla(dtype: str, length: int) -> None:
    ids = np.zeros((1, length), np.int32)
    program, params = compiled(decoder(architecture(16, 2, 1), dtype=dtype), ids, ids + 1)
    assert FUSED not in program.as_text()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(program(params)))


@on_gpu
def test_generation_after_a_fused_prefill_picks_the_likeliest_tokens() -> None:
    rng = new_rng()
    config = architecture(16, 4, 2)
    prompts = [rng.integers(0, config.vocab_size, count).tolist() for count in (3, 40, 17)]
    fused, exact = (decoder(config, dtype=dtype) for dtype in ("bfloat16", "float32"))
    for prompt, added in zip(prompts, generate(fused, prompts, max_new_tokens=8), strict=True):
        assert len(added) == 8
        logits = np.asarray(exact(jnp.asarray([prompt + added], jnp.int32)))[0, len(prompt) - 1 :]
        behind = [float(row.max() - row[token]) for row, token in zip(logits, added, strict=False)]
        # bfloat16 keeps three digits: what it prefers is at most that far behind.
        assert max(behind) <= 0.05 * float(np.abs(logits).max())
