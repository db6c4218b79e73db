"""Causal attention by the kernel that suits the devices.

No array of size [length, length] exists from :data:`LONG` tokens on:

- TPU: splash attention, JAX's own Pallas kernel (FlashAttention-2, arXiv 2307.08691, which skips
  the blocks that causality hides).
- GPU, half precision: cuDNN's fused kernel.
- elsewhere: queries in blocks, each computed again in the backward pass.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.models.sharding import ShardingRules

AttentionKind = Literal["auto", "xla", "cudnn", "splash"]
LONG = 2048
_BLOCK_BYTES = 2**27  # of float32 scores of a block of queries, on one device
_CUDNN_BLOCK = 1024  # queries for which cuDNN is given a mask
_SPLASH_BLOCK = 512  # queries, and keys, that the TPU kernel has in fast memory
_LANES = 128  # the TPU kernel's blocks are multiples of it
_Q_AXES = ("batch", "length", "heads", "head_dim")
_KV_AXES = ("batch", "length", "kv_heads", "head_dim")
# (queries, keys, values, segment ids or None) -> like queries
_Local = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    kind: AttentionKind = "auto",
    mesh: Mesh | None = None,
    rules: ShardingRules = ShardingRules(),  # noqa: B008 (frozen)
) -> jax.Array:
    """Grouped-query attention (arXiv 2305.13245) of every token to those before it and itself.

    Args:
      q: [batch, length, heads, head_dim].
      k: [batch, length, kv_heads, head_dim].
      v: like ``k``.
      segment_ids: int32 [batch, length]; tokens attend only within their segment.
      kind: ``splash``, ``cudnn``, ``xla`` (plain JAX), or ``auto``: what suits the devices of the
        mesh, without one the default device. On other devices than TPUs, ``splash`` is interpreted.
      mesh: axis types Auto.
      rules: how the mesh splits batch and heads.

    Returns:
      Like ``q``.
    """
    if kind == "auto":
        kind = _fitting(q, k, mesh, rules)
    if kind == "splash":
        local = functools.partial(_splash, interpret=_platform(mesh) != "tpu")
        return _on_shards(local, q, k, v, segment_ids, mesh, rules)
    if kind == "cudnn":
        return _cudnn(q, k, v, segment_ids)
    return _xla(q, k, v, segment_ids, _local_shape(q, mesh, rules))


def _platform(mesh: Mesh | None) -> str:
    """Of the devices that will compute, which may only be described ones."""
    if isinstance(mesh, Mesh):
        return str(mesh.devices.flat[0].platform)
    default = jax.config.jax_default_device
    if default is None:
        return jax.default_backend()
    return str(getattr(default, "platform", default))


def _fitting(
    q: jax.Array, k: jax.Array, mesh: Mesh | None, rules: ShardingRules
) -> Literal["xla", "cudnn", "splash"]:
    """The kernel for the devices, where it can compute these arrays.

    cuDNN needs half precision, an even length, and queries and keys that lie on the mesh alike.
    """
    platform, head_dim, length = _platform(mesh), q.shape[3], q.shape[1]
    if platform == "tpu":
        fits = q.dtype in (jnp.bfloat16, jnp.float32) and length >= _LANES
        return "splash" if fits else "xla"
    alike = mesh is None or (
        rules.spec(_Q_AXES, q.shape, mesh) == rules.spec(_KV_AXES, k.shape, mesh)
    )
    fits = (
        platform in ("gpu", "cuda")
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= 128
        and length % 2 == 0
    )
    return "cudnn" if fits and alike else "xla"


def _local_shape(q: jax.Array, mesh: Mesh | None, rules: ShardingRules) -> tuple[int, ...]:
    """The shape of the queries that one device has."""
    if mesh is None:
        return q.shape
    return NamedSharding(mesh, rules.spec(_Q_AXES, q.shape, mesh)).shard_shape(q.shape)


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    local_shape: tuple[int, ...],
) -> jax.Array:
    """Plain JAX; from :data:`LONG` tokens on, one block of queries after the other."""
    batch, length = q.shape[:2]
    if length < LONG:
        mask = None if segment_ids is None else _same_segment(segment_ids, segment_ids)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)
    row = 4 * local_shape[0] * local_shape[2] * length  # bytes of one query's scores
    block = int(np.clip(2 ** int(np.log2(max(_BLOCK_BYTES // row, 1))), 16, LONG // 4))
    count = -(-length // block)

    def blocks(x: jax.Array) -> jax.Array:
        widths = [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths).reshape(batch, count, block, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    # Their gradients are added up over the blocks in this type.
    wide_k, wide_v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (k, v))

    @jax.checkpoint
    def attend(wide: tuple[jax.Array, jax.Array], of_block: tuple[Any, ...]) -> jax.Array:
        q, start, segments = of_block
        mask = (start + jnp.arange(block))[:, None] >= jnp.arange(length)
        mask = mask[None, None]
        if segment_ids is not None:
            mask = mask & _same_segment(segments, segment_ids)
        k, v = (x.astype(q.dtype) for x in wide)
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    segments = None if segment_ids is None else blocks(segment_ids)
    of_blocks = (blocks(q), jnp.arange(count) * block, segments)
    y = jax.lax.map(functools.partial(attend, (wide_k, wide_v)), of_blocks)
    return jnp.moveaxis(y, 0, 1).reshape(batch, count * block, *q.shape[2:])[:, :length]


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The kernel of cuDNN; it reads segments as a mask, hence in blocks of queries."""
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    length = q.shape[1]
    if length < LONG:
        mask = _same_segment(segment_ids, segment_ids)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, implementation="cudnn"
        )
    parts = []
    for start in range(0, length, _CUDNN_BLOCK):
        end = min(start + _CUDNN_BLOCK, length)
        mask = jnp.arange(start, end)[:, None] >= jnp.arange(end)
        mask = mask[None, None] & _same_segment(segment_ids[:, start:end], segment_ids[:, :end])
        attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        parts.append(attend(q[:, start:end], k[:, :end], v[:, :end], mask=mask))
    return jnp.concatenate(parts, axis=1)


def _same_segment(of_queries: jax.Array, of_keys: jax.Array) -> jax.Array:
    """[batch, queries], [batch, keys] -> bool [batch, 1, queries, keys]."""
    return of_queries[:, None, :, None] == of_keys[:, None, None, :]


def _on_shards(
    local: _Local,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    mesh: Mesh | None,
    rules: ShardingRules,
) -> jax.Array:
    """Run a kernel that the compiler cannot split on every device's rows and heads."""
    if mesh is None or mesh.size == 1:
        return local(q, k, v, segment_ids)
    queries = rules.spec(_Q_AXES, q.shape, mesh)
    shards = q.shape[2] // _local_shape(q, mesh, rules)[2]
    # Where there are fewer key heads than shards, each shard takes the one that its queries need.
    copies = math.lcm(k.shape[2], shards) // k.shape[2]
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))
    rows = PartitionSpec(*queries[:2])  # type: ignore[no-untyped-call]
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(queries, queries, queries, rows),
        out_specs=queries,
        check_vma=False,
    )(q, k, v, segment_ids)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    """JAX's TPU kernel. It takes whole blocks: later tokens, which nobody sees, fill the last."""
    length = q.shape[1]
    multiple = _LANES if length <= _SPLASH_BLOCK else _SPLASH_BLOCK
    missing = -length % multiple

    def whole(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    # The kernel does not scale, and wants heads before tokens.
    scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
    q_k_v = tuple(jnp.swapaxes(whole(x), 1, 2) for x in (scaled, k, v))
    segments = None if segment_ids is None else whole(segment_ids)
    kernel = _splash_kernel(q.shape[2], length + missing, interpret)
    y = _in_precision(kernel, jax.config.jax_default_matmul_precision, q_k_v, segments)
    return jnp.swapaxes(y, 1, 2)[:, :length]


@functools.cache
def _splash_kernel(heads: int, length: int, interpret: bool) -> Callable[..., jax.Array]:
    """The kernel for rows: [batch, heads, length, head_dim], and segment ids [batch, length]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = min(length, _SPLASH_BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            mask,
            block_sizes=splash.BlockSizes(**blocks),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
    # Its tables as NumPy's arrays lie on no device, so that programs for all can contain them.
    kernel = jax.tree.map(np.asarray, kernel)

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return kernel(q, k, v, splash.SegmentIds(segment_ids, segment_ids))

    def of_rows(
        q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        if segment_ids is None:
            return jax.vmap(kernel)(q, k, v)
        return jax.vmap(of_row)(q, k, v, segment_ids)

    return of_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_precision(
    kernel: Callable[..., jax.Array],
    precision: str | None,
    q_k_v: tuple[jax.Array, ...],
    segment_ids: jax.Array | None,
) -> jax.Array:
    """Multiply in the same precision backward as forward; JAX has forgotten it by then."""
    return kernel(*q_k_v, segment_ids)


def _forward(
    kernel: Callable[..., jax.Array],
    precision: str | None,
    q_k_v: tuple[jax.Array, ...],
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, Any]:
    return jax.vjp(lambda *q_k_v: kernel(*q_k_v, segment_ids), *q_k_v)


def _backward(
    kernel: Callable[..., jax.Array], precision: str | None, pullback: Any, y: jax.Array
) -> tuple[Any, None]:
    with jax.default_matmul_precision(precision):
        return pullback(y), None


_in_precision.defvjp(_forward, _backward)
