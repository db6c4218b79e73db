"""Causal attention by the kernel that suits the devices.

No array of size [length, length] exists from :data:`LONG` tokens on:

- TPU: splash attention, JAX's own Pallas kernel (FlashAttention-2, arXiv 2307.08691, which skips
  the blocks that causality hides).
- GPU, half precision: cuDNN's fused kernel.
- elsewhere: queries in blocks, each computed again in the backward pass.

Where the mesh splits the tokens of a row (axis ``context``), every device gathers the keys and
values of its rows, which grouped-query attention has few of, and attends from its own queries.
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
_Segments = tuple[jax.Array, jax.Array] | None  # ids of queries and of keys, [batch, length]


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
        return _splash(q, k, v, segment_ids, mesh, rules)
    if kind == "cudnn":
        return _cudnn(q, k, v, segment_ids)
    if _local_shape(q, mesh, rules)[1] < q.shape[1]:
        return _on_shards(_xla, None, q, k, v, segment_ids, mesh, rules)
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    return _xla(None, q, k, v, segments, 0, _local_shape(q, mesh, rules))


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

    cuDNN needs half precision, whole rows of even length, and queries and keys that lie on the mesh
    alike.
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
        and _local_shape(q, mesh, rules)[1] == length
    )
    return "cudnn" if fits and alike else "xla"


def _local_shape(q: jax.Array, mesh: Mesh | None, rules: ShardingRules) -> tuple[int, ...]:
    """The shape of the queries that one device has."""
    if mesh is None:
        return q.shape
    return NamedSharding(mesh, rules.spec(_Q_AXES, q.shape, mesh)).shard_shape(q.shape)


def _xla(
    _: None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: _Segments,
    start: jax.Array | int,
    local_shape: tuple[int, ...] | None = None,
) -> jax.Array:
    """Plain JAX; from :data:`LONG` tokens on, one block of queries after the other.

    Args:
      q: queries.
      k: keys of whole rows.
      v: values of whole rows.
      segments: of queries and keys.
      start: the place of the first query in its row.
      local_shape: of the queries of one device, where that is not the shape of ``q``.
    """
    batch, count = q.shape[:2]
    if k.shape[1] < LONG:
        return _attend_from(q, k, v, segments, start)
    rows_and_heads = (local_shape or q.shape)[0] * (local_shape or q.shape)[2]
    row = 4 * rows_and_heads * k.shape[1]  # bytes of one query's scores
    block = int(np.clip(2 ** int(np.log2(max(_BLOCK_BYTES // row, 1))), 16, LONG // 4))
    missing = -count % block

    def blocks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    # Their gradients are added up over the blocks in this type.
    wide_k, wide_v = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (k, v))

    @jax.checkpoint
    def attend(wide: tuple[jax.Array, jax.Array], of_block: tuple[Any, ...]) -> jax.Array:
        q, start, of_queries = of_block
        k, v = (x.astype(q.dtype) for x in wide)
        return _attend_from(q, k, v, segments and (of_queries, segments[1]), start)

    starts = start + jnp.arange(0, count + missing, block)
    of_blocks = (blocks(q), starts, segments and blocks(segments[0]))
    y = jax.lax.map(functools.partial(attend, (wide_k, wide_v)), of_blocks)
    return jnp.moveaxis(y, 0, 1).reshape(batch, -1, *q.shape[2:])[:, :count]


def _attend_from(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: _Segments, start: jax.Array | int
) -> jax.Array:
    """Attention of queries, the first of which is token ``start`` of its row."""
    places = start + jnp.arange(q.shape[1])
    mask = (places[:, None] >= jnp.arange(k.shape[1]))[None, None]
    if segments is not None:
        mask = mask & _same_segment(*segments)
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


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
    attend: Callable[..., jax.Array],
    kernel: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    mesh: Mesh | None,
    rules: ShardingRules,
) -> jax.Array:
    """Attend on every device from its queries: some rows, heads, and tokens.

    Args:
      attend: ``(kernel, q, k, v, segments, start) -> y``; ``start`` is the place of the first query
        in its row, whose keys are all there.
      kernel: the TPU kernel, whose tables are split as the queries' tokens are; None without one.
      q: as in :func:`causal_attention`.
      k: as there.
      v: as there.
      segment_ids: as there.
      mesh: as there.
      rules: as there.
    """
    if mesh is None or mesh.size == 1:
        return attend(kernel, q, k, v, None if segment_ids is None else (segment_ids,) * 2, 0)
    queries = rules.spec(_Q_AXES, q.shape, mesh)
    rows, context = PartitionSpec(*queries[:2]), queries[1]  # type: ignore[no-untyped-call]
    shards = q.shape[2] // _local_shape(q, mesh, rules)[2]
    # Where there are fewer key heads than shards, each shard takes the one that its queries need.
    copies = math.lcm(k.shape[2], shards) // k.shape[2]
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))

    def on_shard(
        kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None
    ) -> jax.Array:
        if context is None:
            return attend(kernel, q, k, v, None if ids is None else (ids, ids), 0)
        whole = functools.partial(jax.lax.all_gather, axis_name=context, axis=1, tiled=True)
        segments = None if ids is None else (ids, whole(ids))
        start = jax.lax.axis_index(context) * q.shape[1]
        return attend(kernel, q, whole(k), whole(v), segments, start)

    tables = None
    if kernel is not None:
        by_tokens = PartitionSpec(None, context)  # type: ignore[no-untyped-call]
        tables = kernel.manual_sharding_spec(NamedSharding(mesh, by_tokens))
    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(tables, queries, queries, queries, rows),
        out_specs=queries,
        check_vma=False,
    )(kernel, q, k, v, segment_ids)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    mesh: Mesh | None,
    rules: ShardingRules,
) -> jax.Array:
    """JAX's TPU kernel. It takes whole blocks: later tokens, which nobody sees, fill the last."""
    length = q.shape[1]
    shards = 1 if mesh is None else rules.shards("length", mesh)
    multiple = _LANES if length <= _SPLASH_BLOCK * shards else _SPLASH_BLOCK
    missing = -length % (multiple * shards)

    def whole(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x

    q, k, v = whole(q), whole(k), whole(v)
    segment_ids = None if segment_ids is None else whole(segment_ids)
    heads = _local_shape(q, mesh, rules)[2]
    kernel = _splash_kernel(heads, length + missing, shards, _platform(mesh) != "tpu")
    return _on_shards(_splash_rows, kernel, q, k, v, segment_ids, mesh, rules)[:, :length]


@functools.cache
def _splash_kernel(heads: int, length: int, shards: int, interpret: bool) -> Any:
    """The kernel for one row, of which each shard has an equal part of the queries."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = min(length // shards, _SPLASH_BLOCK)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            mask,
            block_sizes=splash.BlockSizes(**blocks),
            head_shards=1,
            q_seq_shards=shards,
            interpret=interpret,
        )
    # Its tables as NumPy's arrays lie on no device, so that programs for all can contain them.
    return jax.tree.map(np.asarray, kernel)


def _splash_rows(
    kernel: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: _Segments,
    _: jax.Array | int,
) -> jax.Array:
    """Apply the kernel, which does not scale and wants heads before tokens, to every row."""
    scaled = (q.astype(jnp.float32) * q.shape[3] ** -0.5).astype(q.dtype)
    q_k_v = tuple(jnp.swapaxes(x, 1, 2) for x in (scaled, k, v))
    precision = jax.config.jax_default_matmul_precision
    return jnp.swapaxes(_in_precision(precision, kernel, q_k_v, segments), 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_precision(
    precision: str | None, kernel: Any, q_k_v: tuple[jax.Array, ...], segments: _Segments
) -> jax.Array:
    """Multiply in the same precision backward as forward; JAX has forgotten it by then."""
    return _plain(kernel, q_k_v, segments)


def _plain(kernel: Any, q_k_v: tuple[jax.Array, ...], segments: _Segments) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    if segments is None:
        return jax.vmap(kernel)(*q_k_v)
    return jax.vmap(kernel)(*q_k_v, SegmentIds(*segments))


def _forward(
    precision: str | None, kernel: Any, q_k_v: tuple[jax.Array, ...], segments: _Segments
) -> tuple[jax.Array, Any]:
    return jax.vjp(lambda *q_k_v: _plain(kernel, q_k_v, segments), *q_k_v)


def _backward(precision: str | None, pullback: Any, y: jax.Array) -> tuple[None, Any, None]:
    with jax.default_matmul_precision(precision):
        return None, pullback(y), None


_in_precision.defvjp(_forward, _backward)
