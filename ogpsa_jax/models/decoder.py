"""One decoder for Llama 2/3.x, Mistral without a window, Qwen2/2.5 and Qwen3, in Flax NNX."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from ogpsa_jax import Kernel, SecondMoment, second_moment
from ogpsa_jax.models.attention import AttentionKind
from ogpsa_jax.models.config import DecoderConfig
from ogpsa_jax.models.layers import (
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    MLP_INPUT,
    MLP_OUTPUT,
    DecoderLayer,
    Linear,
    ModelPlacement,
    RMSNorm,
    normal_init,
    split_keys,
)
from ogpsa_jax.models.rope import rope_table
from ogpsa_jax.models.sharding import Gathered, ShardingRules, check_mesh, gather, matmul_gathered
from ogpsa_jax.remat import LAYER_INPUT, Remat, check_remat, named, remat_policy

# Tokens of a micro-batch, over the vocabulary, up to which devices exchange hidden states. Both
# ways send the same at 1.5; gathering the kernel needs memory for it and its gradient.
_EXCHANGED = 2
FINAL_HIDDEN = "final_hidden"
DECODER_KERNELS = {
    rf"\blayers\b.*\b{names}\b.*\b(kernel|a)\b": Kernel(inputs, stacked=(0,))
    for names, inputs in {
        "(q_proj|k_proj|v_proj)": ATTENTION_INPUT,
        "o_proj": ATTENTION_OUTPUT,
        "(gate_proj|up_proj)": MLP_INPUT,
        "down_proj": MLP_OUTPUT,
    }.items()
} | {r"\blm_head\b": Kernel(FINAL_HIDDEN)}
"""The matrices of a decoder, and of LoRA adapters on it (``a``, which meets the layer's input)."""


class Embedding(nnx.Module):  # type: ignore[misc]
    """Token embeddings [vocab, hidden]."""

    def __init__(self, config: DecoderConfig, placement: ModelPlacement, rngs: nnx.Rngs) -> None:
        normal = normal_init(config.initializer_range)
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = placement.param(normal, rngs.params(), shape, ("vocab", "embed"))


class Unembedding(nnx.Module):  # type: ignore[misc]
    """Output kernel [hidden, vocab] of a model whose embeddings are not tied."""

    def __init__(self, config: DecoderConfig, placement: ModelPlacement, rngs: nnx.Rngs) -> None:
        normal = normal_init(config.initializer_range)
        shape = (config.hidden_size, config.vocab_size)
        axes = ("embed", ("vocab", "embed"))
        self.kernel = placement.param(normal, rngs.params(), shape, axes)


class Decoder(nnx.Module):  # type: ignore[misc]
    """A causal language model.

    All its state is ``nnx.Param``: ``graphdef, params = nnx.split(model, nnx.Param)`` loses
    nothing. Weights of the layers are stacked along a leading axis and scanned over.

    Args:
      config: the architecture.
      rngs: randomness of the initial weights, normal with ``config.initializer_range`` as in
        transformers.
      dtype: type of the computation; norms, rotary embedding, softmax and logits are float32
        always. With float32, matrix products are float32 on every device.
      param_dtype: type of the parameters.
      remat: what the backward pass computes again: ``none``, ``full`` (all of a layer), ``dots``
        (all but matrix products), ``save_qkv_proj`` (all but the projections to queries, keys and
        values), ``save_dot_except_mlp`` (these, and the projection of what was attended to, are
        saved). ``full_offloaded``, ``qkv_proj_offloaded`` and ``dots_offloaded`` keep what is saved
        in pinned host memory.
      mesh: where parameters and activations live, axis types Auto; ``None``: the default device.
      rules: the table from logical axes to mesh axes.
      attention: ``auto`` takes what suits the devices: ``splash`` on TPUs, ``cudnn`` on GPUs in
        half precision, else ``xla``; see :func:`~ogpsa_jax.models.attention.causal_attention`.

    Raises:
      ValueError: a mesh whose axis types are not all Auto, or an unknown ``remat``.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str | jnp.dtype = "float32",
        param_dtype: str | jnp.dtype = "float32",
        remat: Remat = "none",
        mesh: Mesh | None = None,
        rules: ShardingRules = ShardingRules(),  # noqa: B008 (frozen)
        attention: AttentionKind = "auto",
    ) -> None:
        check_mesh(mesh)
        check_remat(remat)
        placement = ModelPlacement(jnp.dtype(dtype), jnp.dtype(param_dtype), mesh, rules, attention)
        self.config = config
        self.placement = placement
        self.remat: Remat = remat
        # The Hugging Face folder the weights are from: export takes tokenizer and types from there.
        self.source: str | None = None
        self.embed_tokens = Embedding(config, placement, rngs)
        self.layers = DecoderLayer(config, placement, rngs)
        self.norm = RMSNorm((), config.hidden_size, config.rms_norm_eps, placement)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Unembedding(config, placement, rngs)

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token.

        Args:
          input_ids: int32 [batch, length].
          positions: int32 [batch, length]; counted from 0 in each row by default.
          segment_ids: int32 [batch, length]; tokens attend only within their segment. Padding is a
            segment of its own (0 by convention); without it, rows are one segment.
          dropout_keys: PRNG keys [batch] of the dropout on the inputs of LoRA adapters; without
            them nothing is dropped.

        Returns:
          float32 [batch, length, vocab].
        """
        hidden = self.hidden_states(input_ids, positions, segment_ids, dropout_keys)
        return self.unembed(hidden)

    def hidden_states(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """What :meth:`unembed` turns into logits.

        Args:
          input_ids: int32 [batch, length].
          positions: as in :meth:`__call__`.
          segment_ids: as in :meth:`__call__`.
          dropout_keys: as in :meth:`__call__`.

        Returns:
          [batch, length, hidden] after the final norm, in the dtype of the computation.
        """
        return self._run(input_ids, positions, segment_ids, dropout_keys)[0]

    def input_moments(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        *,
        size: int | None = None,
        seed: int = 0,
    ) -> dict[str, SecondMoment]:
        """Second moments of what every kernel multiplies, for a subspace of inputs.

        Layer by layer, so that the inputs of one layer are all that exists at a time.

        Args:
          input_ids: as in :meth:`__call__`.
          positions: as in :meth:`__call__`.
          segment_ids: as in :meth:`__call__`; tokens of segment 0, padding, do not count.
          size: see :func:`ogpsa_jax.second_moment`.
          seed: see :func:`ogpsa_jax.second_moment`.

        Returns:
          Moments by the names of :data:`DECODER_KERNELS`, those of the layers stacked ``[layers]``.
        """
        mask = None if segment_ids is None else segment_ids > 0

        def measure(inputs: jax.Array) -> SecondMoment:
            return second_moment(inputs, mask, size=size, seed=seed)

        hidden, found = self._run(input_ids, positions, segment_ids, None, measure)
        return found if self.lm_head is None else {**found, FINAL_HIDDEN: measure(hidden)}

    def _run(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None,
        segment_ids: jax.Array | None,
        dropout_keys: jax.Array | None,
        measure: Callable[[jax.Array], SecondMoment] | None = None,
    ) -> tuple[jax.Array, dict[str, SecondMoment]]:
        """The last hidden states, and what was measured of the kernels' inputs in every layer."""
        graphdef, stacked = nnx.split(self.layers)
        stacked = jax.tree.map(
            lambda param: param.replace(self.placement.value(param)),
            stacked,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )

        def step(x: jax.Array, layer: tuple[nnx.State, jax.Array | None]) -> Any:
            weights, keys = layer
            x = named(x, LAYER_INPUT)
            found: dict[str, SecondMoment] = {}

            def tap(name: str, inputs: jax.Array) -> None:
                if measure is not None:
                    found[name] = measure(inputs)

            layer_fn = nnx.merge(graphdef, weights)
            return layer_fn(x, rope, segment_ids, dropout_keys=keys, tap=tap), found

        if self.remat != "none":
            # A scan cannot be optimised across its steps: no barrier is needed against it.
            step = jax.checkpoint(step, prevent_cse=False, policy=remat_policy(self.remat))
        with self.matmul_precision():
            rope = self.rope(input_ids, positions)
            keys: Any = None
            if dropout_keys is not None:
                keys = split_keys(dropout_keys, self.config.num_layers)
            x = self.embed(input_ids)
            with jax.named_scope("layers"):
                x, found = jax.lax.scan(step, x, (stacked, keys))
            return self.norm(x), found

    def rope(
        self, input_ids: jax.Array, positions: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Rotary tables of the positions, which count from 0 in each row by default."""
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None], input_ids.shape
            )
        return rope_table(self.config.rope, self.config.head_dim, positions)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Embeddings of tokens: int32 [batch, length] -> [batch, length, hidden]."""
        with jax.named_scope("embed_tokens"):
            return self._embed(input_ids)

    def _embed(self, input_ids: jax.Array) -> jax.Array:
        table = self.placement.value(self.embed_tokens.embedding)
        x = jnp.take(table, input_ids, axis=0).astype(self.placement.dtype)
        # Every device looks up its part of the hidden dimension for all rows; then they exchange.
        # A batch has far fewer tokens than the vocabulary, whose table is so never gathered.
        x = self.placement.constrain(x, "exchanged", None, "embed")
        # One axis of the mesh at a time, which the compiler would not do by itself.
        x = self.placement.constrain(x, "exchanged", ("length",), "embed")
        return self.placement.constrain(x, "batch", "length", "features")

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits of hidden states: [..., hidden] -> float32 [..., vocab]."""
        return self._logits(hidden, self.placement.value(self._head))

    def with_logits(self, compute: Callable[..., Any], hidden: jax.Array, *rows: jax.Array) -> Any:
        """``compute(unembed, hidden, *rows)``, which calls `unembed` for parts of `hidden`.

        On a mesh, by the number of tokens: devices exchange hidden states, and each computes the
        logits of its part of the vocabulary; or each row shard computes all logits of its rows
        with the kernel, which is gathered once, and whose gradient is added up on each device and
        reduced once, however often logits are computed.

        Args:
          compute: what it returns has the axes batch and length, as its arguments have.
          hidden: ``[batch, length, hidden]``.
          *rows: further arrays ``[batch, length, ...]``.
        """
        batch, length = hidden.shape[:2]
        parts = self.placement.length_parts(length)
        if parts == 1:
            return self._with_logits(compute, hidden, *rows)

        def fold(x: jax.Array) -> jax.Array:
            # In two steps, or the compiler would not see that nothing moves.
            x = x.reshape(batch, parts, length // parts, *x.shape[2:])
            x = self.placement.constrain(x, "batch", "length", *(None,) * (x.ndim - 2))
            x = x.reshape(batch * parts, *x.shape[2:])
            return self.placement.constrain(x, ("batch", "length"), *(None,) * (x.ndim - 1))

        found = self._with_logits(compute, *(fold(x) for x in (hidden, *rows)))
        return jax.tree.map(lambda x: x.reshape(batch, length, *x.shape[2:]), found)

    def _with_logits(self, compute: Callable[..., Any], hidden: jax.Array, *rows: jax.Array) -> Any:
        """:meth:`with_logits`, where the parts of a row that devices have count as rows."""
        split = self.placement.row_axes(len(hidden))
        tokens, vocab = hidden.shape[0] * hidden.shape[1], self.config.vocab_size
        if not split or tokens <= _EXCHANGED * vocab:
            return compute(self._exchanging(), hidden, *rows)
        stored = self.placement.spec(self._head, only=split)

        def of_shard(kernel: jax.Array, *rows: jax.Array) -> Any:
            with jax.named_scope("lm_head"):
                whole = gather(kernel, stored, self.placement.dtype)

            def unembed(hidden: jax.Array) -> jax.Array:
                used = Gathered(*(x.T for x in whole)) if self.lm_head is None else whole
                with jax.named_scope("lm_head"):
                    return matmul_gathered(hidden, used)

            return compute(unembed, *rows)

        by_rows = PartitionSpec(split)  # type: ignore[no-untyped-call]
        return jax.shard_map(
            of_shard,
            mesh=self.placement.mesh,
            axis_names=set(split),
            in_specs=(stored, *(by_rows for _ in (hidden, *rows))),
            out_specs=by_rows,
            check_vma=False,
        )(self.placement.value(self._head), hidden, *rows)

    def _exchanging(self) -> Callable[[jax.Array], jax.Array]:
        """:meth:`unembed` where every device has its part of the vocabulary, and all rows."""
        place, tied = self.placement, self.lm_head is None
        with jax.named_scope("lm_head"):
            axes = (("vocab", "embed"), "features") if tied else ("features", ("vocab", "embed"))
            kernel = place.constrain(place.value(self._head), *axes)

        def unembed(hidden: jax.Array) -> jax.Array:
            with jax.named_scope("lm_head"):
                hidden = place.constrain(hidden, "exchanged", None, "features")
            logits = self._logits(hidden, kernel)
            return place.constrain(logits, "exchanged", None, ("vocab", "embed"))

        return unembed

    @property
    def _head(self) -> nnx.Param:
        """[hidden, vocab], or the embeddings that it is tied to."""
        return self.embed_tokens.embedding if self.lm_head is None else self.lm_head.kernel

    def _logits(self, hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = kernel.T if self.lm_head is None else kernel
        with self.matmul_precision(), jax.named_scope("lm_head"):
            return jnp.matmul(
                hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
            )

    def linears(self) -> dict[tuple[str, ...], Linear]:
        """The linear maps of the layers, each under its path."""
        parts = {
            "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
            "mlp": ("gate_proj", "up_proj", "down_proj"),
        }
        return {
            ("layers", part, name): getattr(getattr(self.layers, part), name)
            for part, names in parts.items()
            for name in names
        }

    def matmul_precision(self) -> contextlib.AbstractContextManager[None]:
        """Keep accelerators from computing float32 products in TF32 or bfloat16."""
        if self.placement.dtype == jnp.float32:
            return jax.default_matmul_precision("highest")
        return contextlib.nullcontext()
