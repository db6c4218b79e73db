"""The parts of a decoder layer. Module and parameter names follow Hugging Face's weight names.

The layers of a model are one :class:`DecoderLayer` whose parameters have a leading axis of layers;
:class:`~ogpsa_jax.models.decoder.Decoder` scans over it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.models.attention import AttentionKind, causal_attention
from ogpsa_jax.models.config import DecoderConfig
from ogpsa_jax.models.rope import apply_rope
from ogpsa_jax.models.sharding import LogicalAxis, ShardingRules, as_tuple, constrain
from ogpsa_jax.remat import OUT_PROJ, QKV_PROJ, named

Tap = Callable[[str, jax.Array], None] | None
# What the kernels of a layer multiply, by the names that taps and `DECODER_KERNELS` know it by.
ATTENTION_INPUT, ATTENTION_OUTPUT = "attention_input", "attention_output"
MLP_INPUT, MLP_OUTPUT = "mlp_input", "mlp_output"


@dataclasses.dataclass(frozen=True)
class ModelPlacement:
    """Dtypes, mesh and sharding rules that all parts of a model share."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype
    mesh: Mesh | None
    rules: ShardingRules
    attention: AttentionKind

    def param(
        self,
        init: Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array],
        key: jax.Array,
        shape: tuple[int, ...],
        axes: Sequence[LogicalAxis],
        kind: type[nnx.Param] = nnx.Param,
    ) -> nnx.Param:
        """A parameter, created where it belongs; ``axes`` names its dimensions.

        Compiled even without a mesh, so that values do not depend on there being one.
        """
        sharding = None
        if self.mesh is not None:
            sharding = NamedSharding(self.mesh, self.rules.spec(axes, shape, self.mesh))
        create = _creator(init, shape, self.param_dtype, sharding)
        # The names are logical: no mesh has them, and Flax must not try to shard by them.
        return kind(create(key), out_sharding=tuple(axes), eager_sharding=False)

    def constrain(self, array: jax.Array, *axes: LogicalAxis) -> jax.Array:
        """Constrain the sharding of an activation."""
        return constrain(array, axes, self.mesh, self.rules)

    def value(self, param: nnx.Param) -> jax.Array:
        """A parameter's array, constrained to its sharding; its gradient then has it too."""
        return self.constrain(param[...], *param.get_metadata()["out_sharding"])

    def row_axes(self, rows: int) -> tuple[str, ...]:
        """The mesh axes over which so many rows, or parts of rows, are split; none if not all."""
        if self.mesh is None:
            return ()
        sizes = self.mesh.shape
        [part] = self.rules.spec((("batch", "length"),), (self.mesh.size,), self.mesh)
        axes = tuple(axis for axis in as_tuple(part) if sizes[axis] > 1)
        return axes if rows % math.prod(sizes[axis] for axis in axes) == 0 else ()

    def length_parts(self, length: int) -> int:
        """Into how many parts the mesh splits the tokens of a row."""
        shards = 1 if self.mesh is None else self.rules.shards("length", self.mesh)
        return 1 if length % shards else shards

    def spec(self, param: nnx.Param, only: Sequence[str]) -> PartitionSpec:
        """How a parameter is split over some of the mesh axes."""
        assert self.mesh is not None
        whole = self.rules.spec(param.get_metadata()["out_sharding"], param.shape, self.mesh)
        kept = [tuple(axis for axis in as_tuple(part) if axis in only) for part in whole]
        return PartitionSpec(*(part or None for part in kept))  # type: ignore[no-untyped-call]


# A function of its own for each scale would be compiled again for each parameter.
normal_init = functools.cache(nnx.initializers.normal)


@functools.cache
def _creator(
    init: Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    sharding: NamedSharding | None,
) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda key: init(key, shape, dtype), out_shardings=sharding)


class RMSNorm(nnx.Module):  # type: ignore[misc]
    """Root-mean-square normalisation (arXiv 1910.07467), in float32."""

    def __init__(
        self, lead: tuple[int, ...], size: int, eps: float, placement: ModelPlacement
    ) -> None:
        axes = ("layers",) * len(lead) + ("norm",)
        init = nnx.initializers.ones_init()
        self.scale = placement.param(init, jax.random.key(0), (*lead, size), axes)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., size] -> the same shape and dtype."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (wide * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


LoraParam = nnx.LoRAParam  # Flax's own kind, so that others' filters find ours


def _peft_uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Kaiming-uniform with a = sqrt(5), as torch draws linear layers: [..., in, rank]."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


class Adapter(nnx.Module):  # type: ignore[misc]
    """Low-rank adapter of a :class:`Linear` (LoRA, arXiv 2106.09685): ``scale * x @ a @ b``.

    ``a`` [layers, in, rank] starts uniform in +-1/sqrt(in), the Kaiming initialisation of ``peft``;
    ``b`` [layers, rank, out] starts at zero, so that the model starts as it was.
    """

    def __init__(
        self,
        linear: "Linear",
        rank: int,
        alpha: float,
        dropout: float,
        placement: ModelPlacement,
        rngs: nnx.Rngs,
    ) -> None:
        kernel = linear.kernel
        layers, size_in, size_out = kernel.shape
        _, axis_in, axis_out = kernel.get_metadata()["out_sharding"]

        # Over all axes of the mesh, for so is the subspace of its inputs then.
        whole = axis_in if axis_in == "embed" else (axis_in, "embed")
        shape, axes = (layers, size_in, rank), ("layers", whole, "lora_rank")
        self.a = placement.param(_peft_uniform, rngs.params(), shape, axes, LoraParam)
        zeros, shape = nnx.initializers.zeros_init(), (layers, rank, size_out)
        axes = ("layers", "lora_rank", axis_out)
        self.b = placement.param(zeros, rngs.params(), shape, axes, LoraParam)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout

    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None) -> jax.Array:
        """[batch, ..., in] -> [batch, ..., out], in the dtype of ``x``.

        Elements of ``x`` are dropped by their row's key, in whatever batch the row comes.
        """
        if dropout_keys is not None and self.dropout > 0:

            def keep(key: jax.Array) -> jax.Array:
                return jax.random.bernoulli(key, 1 - self.dropout, x.shape[1:])

            x = jnp.where(jax.vmap(keep)(dropout_keys), x / (1 - self.dropout), 0)
        y = (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype)
        return y * self.scale

    @property
    def scale(self) -> float:
        """What the product of ``a`` and ``b`` is multiplied by."""
        return self.alpha / self.rank


@jax.jit
def merged_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """One layer's ``kernel + scale * a @ b``, computed in float32, in the dtype of the kernel."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)


class Linear(nnx.Module):  # type: ignore[misc]
    """``x @ kernel + bias``; kernel [in, out], stored stacked [layers, in, out]."""

    def __init__(
        self,
        sizes: tuple[int, int, int],
        axes: tuple[LogicalAxis, LogicalAxis],
        bias: bool,
        initializer_range: float,
        placement: ModelPlacement,
        rngs: nnx.Rngs,
    ) -> None:
        layers, _, size_out = sizes
        normal = normal_init(initializer_range)
        self.kernel = placement.param(normal, rngs.params(), sizes, ("layers", *axes))
        zeros, shape = nnx.initializers.zeros_init(), (layers, size_out)
        self.bias = (
            placement.param(zeros, rngs.params(), shape, ("layers", axes[1])) if bias else None
        )
        self.lora: Adapter | None = nnx.data(None)  # may be given one later

    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """[..., in] -> [..., out], in the dtype of ``x``; keys for the adapter's dropout."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            bias = self.bias[...].astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        if self.lora is not None:
            y = y + self.lora(x, dropout_keys)
        return y


def split_keys(keys: jax.Array | None, count: int) -> jax.Array | list[None]:
    """Keys [batch] for several consumers: [count, batch]; none of none."""
    if keys is None:
        return [None] * count
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


@dataclasses.dataclass
class Cache:
    """Keys and values of all layers, and where one layer's new ones go.

    Attributes:
      keys: [layers, batch, slots, kv_heads, head_dim].
      values: like ``keys``.
      layer: whose turn it is.
      start: slot of the first new token; a prompt starts at slot 0.
      visible: bool [batch, slots], what a new token attends to; None for a prompt, whose tokens
        attend to each other as without a cache.
    """

    keys: jax.Array
    values: jax.Array
    layer: jax.Array
    start: jax.Array
    visible: jax.Array | None


class Attention(nnx.Module):  # type: ignore[misc]
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, placement: ModelPlacement, rngs: nnx.Rngs) -> None:
        layers, hidden = config.num_layers, config.hidden_size
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def linear(
            size_in: int, size_out: int, axes: tuple[LogicalAxis, LogicalAxis], bias: bool
        ) -> Linear:
            scale = config.initializer_range
            return Linear((layers, size_in, size_out), axes, bias, scale, placement, rngs)

        self.q_proj = linear(hidden, width, ("embed", ("heads", "embed")), config.qkv_bias)
        self.k_proj = linear(hidden, kv_width, ("embed", ("kv_heads", "embed")), config.qkv_bias)
        self.v_proj = linear(hidden, kv_width, ("embed", ("kv_heads", "embed")), config.qkv_bias)
        self.o_proj = linear(width, hidden, ("heads", "embed"), config.output_bias)
        norm = functools.partial(
            RMSNorm, (layers,), config.head_dim, config.rms_norm_eps, placement
        )
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.head_dim = config.head_dim
        self.placement = placement

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        cache: Cache | None,
        dropout_keys: jax.Array | None,
        tap: Tap,
    ) -> jax.Array:
        """Attention of :class:`DecoderLayer`; see there for the arguments."""
        batch, length, _ = x.shape
        if tap is not None:
            tap(ATTENTION_INPUT, x)
        q_key, k_key, v_key, o_key = split_keys(dropout_keys, 4)

        def heads(projection: Linear, axis: str, key: jax.Array | None) -> jax.Array:
            y = named(projection(x, key), QKV_PROJ)
            y = y.reshape(batch, length, -1, self.head_dim)
            return self.placement.constrain(y, "batch", "length", axis, "head_dim")

        q, k, v = (
            heads(self.q_proj, "heads", q_key),
            heads(self.k_proj, "kv_heads", k_key),
            heads(self.v_proj, "kv_heads", v_key),
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        visible = None
        if cache is not None:
            visible = cache.visible
            # Into the whole cache, so that only the new tokens are written.
            at = (cache.layer, 0, cache.start, 0, 0)
            cache.keys = jax.lax.dynamic_update_slice(cache.keys, k[None], at)
            cache.values = jax.lax.dynamic_update_slice(cache.values, v[None], at)
            if visible is not None:
                k = jax.lax.dynamic_index_in_dim(cache.keys, cache.layer, keepdims=False)
                v = jax.lax.dynamic_index_in_dim(cache.values, cache.layer, keepdims=False)
        if visible is not None:
            y = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None, None, :])
        else:
            y = causal_attention(
                q,
                k,
                v,
                segment_ids,
                kind=self.placement.attention,
                mesh=self.placement.mesh,
                rules=self.placement.rules,
            )
        y = y.reshape(batch, length, -1)
        if tap is not None:
            tap(ATTENTION_OUTPUT, y)
        return named(self.o_proj(y, o_key), OUT_PROJ)


class Mlp(nnx.Module):  # type: ignore[misc]
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, placement: ModelPlacement, rngs: nnx.Rngs) -> None:
        def linear(size_in: int, size_out: int, axes: tuple[LogicalAxis, LogicalAxis]) -> Linear:
            sizes, scale = (config.num_layers, size_in, size_out), config.initializer_range
            return Linear(sizes, axes, config.mlp_bias, scale, placement, rngs)

        self.gate_proj = linear(
            config.hidden_size, config.intermediate_size, ("embed", ("mlp", "embed"))
        )
        self.up_proj = linear(
            config.hidden_size, config.intermediate_size, ("embed", ("mlp", "embed"))
        )
        self.down_proj = linear(config.intermediate_size, config.hidden_size, ("mlp", "embed"))
        self.placement = placement

    def __call__(self, x: jax.Array, dropout_keys: jax.Array | None, tap: Tap) -> jax.Array:
        """[batch, length, hidden] -> the same."""
        gate_key, up_key, down_key = split_keys(dropout_keys, 3)
        if tap is not None:
            tap(MLP_INPUT, x)
        y = jax.nn.silu(self.gate_proj(x, gate_key)) * self.up_proj(x, up_key)
        y = self.placement.constrain(y, "batch", "length", "mlp")
        if tap is not None:
            tap(MLP_OUTPUT, y)
        return self.down_proj(y, down_key)


class DecoderLayer(nnx.Module):  # type: ignore[misc]
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: DecoderConfig, placement: ModelPlacement, rngs: nnx.Rngs) -> None:
        lead, size, eps = (config.num_layers,), config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(lead, size, eps, placement)
        self.self_attn = Attention(config, placement, rngs)
        self.post_attention_layernorm = RMSNorm(lead, size, eps, placement)
        self.mlp = Mlp(config, placement, rngs)
        self.placement = placement

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        segment_ids: jax.Array | None,
        cache: Cache | None = None,
        dropout_keys: jax.Array | None = None,
        tap: Tap = None,
    ) -> jax.Array:
        """One layer.

        Args:
          x: [batch, length, hidden].
          rope: tables for the positions of ``x``.
          segment_ids: int32 [batch, length]; tokens attend only within their segment.
          cache: updated in place when given.
          dropout_keys: of the adapters' dropout; none drops nothing.
          tap: called with the name and the value of what the kernels multiply.

        Returns:
          Like ``x``.
        """
        attention_key, mlp_key = split_keys(dropout_keys, 2)
        x = x + self.self_attn(
            self.input_layernorm(x), rope, segment_ids, cache, attention_key, tap
        )
        x = self.placement.constrain(x, "batch", "length", "features")
        x = x + self.mlp(self.post_attention_layernorm(x), mlp_key, tap)
        return self.placement.constrain(x, "batch", "length", "features")
