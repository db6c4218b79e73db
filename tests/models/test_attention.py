"""The attention kernels against float64, forward and backward, on one device and on a mesh."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from ogpsa_jax.models import Decoder, DecoderConfig, generate
from ogpsa_jax.models import attention as attention_module
from ogpsa_jax.models.attention import LONG, AttentionKind, causal_attention

from .conftest import new_rng

Arrays = dict[str, np.ndarray]
KINDS: list[AttentionKind] = ["xla", "cudnn", "splash"]


@pytest.fixture(autouse=True)
def cudnn_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let XLA compute what cuDNN is asked for, the mask of each block included."""
    given = jax.nn.dot_product_attention

    def attend(*args: Any, implementation: str | None = None, **options: Any) -> jax.Array:
        return given(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)


def draw(rng: np.random.Generator, shape: tuple[int, ...], kv_heads: int) -> Arrays:
    """Queries, keys, values, the gradient of the outputs; rows that are packed and padded."""
    batch, length, _, head_dim = shape
    sizes = {"q": shape, "k": (batch, length, kv_heads, head_dim), "y_grad": shape}
    sizes["v"] = sizes["k"]
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    arrays["q"] *= 2  # so that some tokens attend to few others
    segments = np.sort(rng.integers(1, 5, (batch, length)), axis=1)
    segments[0, length - length // 7 :] = 0
    segments[-1, : length // 5] = 0
    return {**arrays, "segment_ids": segments.astype(np.int32)}


def exact(arrays: Arrays, segmented: bool) -> Arrays:
    """Outputs and gradients in float64, by the equations."""
    q, k, v, y_grad = (arrays[name].astype(np.float64) for name in ("q", "k", "v", "y_grad"))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    found = {"y": np.zeros_like(q), "q": np.zeros_like(q), "k": np.zeros_like(k)}
    found["v"] = np.zeros_like(v)
    seen = np.tri(q.shape[1], dtype=bool)
    for row in range(q.shape[0]):
        ids = arrays["segment_ids"][row]
        mask = seen & (ids[:, None] == ids) if segmented else seen
        for head in range(q.shape[2]):
            at, kv_at = (row, slice(None), head), (row, slice(None), head // group)
            scores = np.where(mask, scale * q[at] @ k[kv_at].T, -np.inf)
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            shares /= shares.sum(axis=1, keepdims=True)
            shares_grad = y_grad[at] @ v[kv_at].T
            scores_grad = shares * (shares_grad - (shares * shares_grad).sum(axis=1, keepdims=True))
            found["y"][at] = shares @ v[kv_at]
            found["v"][kv_at] += shares.T @ y_grad[at]
            found["q"][at] = scale * scores_grad @ k[kv_at]
            found["k"][kv_at] += scale * scores_grad.T @ q[at]
    return found


def computed(arrays: Arrays, segmented: bool, dtype: str, **options: Any) -> Arrays:
    """Outputs and gradients of :func:`causal_attention` in a dtype."""
    q, k, v, y_grad = (jnp.asarray(arrays[name], dtype) for name in ("q", "k", "v", "y_grad"))
    segment_ids = jnp.asarray(arrays["segment_ids"]) if segmented else None

    @jax.jit
    def run(*q_k_v: jax.Array) -> tuple[jax.Array, ...]:
        attend = functools.partial(causal_attention, segment_ids=segment_ids, **options)
        y, pullback = jax.vjp(attend, *q_k_v)
        return y, *pullback(y_grad)

    with jax.default_matmul_precision("highest"):
        found = dict(zip(("y", "q", "k", "v"), run(q, k, v), strict=True))
    assert all(x.dtype == dtype for x in found.values())
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def distances(found: Arrays, wanted: Arrays) -> dict[str, float]:
    """The largest deviation of each array, in units of its largest element."""
    return {
        name: float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max())
        for name in wanted
    }


# (batch, length, heads, size of a head), key heads
SHAPES = [
    ((2, 130, 4, 16), 2),
    ((1, 700, 2, 8), 1),  # more blocks than one, the last not full
    ((1, LONG + 100, 2, 8), 2),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("segmented", [True, False])
@pytest.mark.parametrize(("shape", "kv_heads"), SHAPES)
def test_outputs_and_gradients_equal_float64_within_the_dtype(
    kind: AttentionKind, shape: tuple[int, ...], kv_heads: int, segmented: bool
) -> None:
    arrays = draw(new_rng(), shape, kv_heads)
    found = computed(arrays, segmented, "float32", kind=kind)
    # Sums of a few thousand terms, in float32.
    assert max(distances(found, exact(arrays, segmented)).values()) < 2e-5

    # What bfloat16 cannot represent is no fault of the kernel.
    arrays = {
        name: x if name == "segment_ids" else np.asarray(jnp.asarray(x, "bfloat16"), np.float32)
        for name, x in arrays.items()
    }
    found = computed(arrays, segmented, "bfloat16", kind=kind)
    # Three digits: queries, shares and outputs are rounded, each by at most 2**-9.
    assert max(distances(found, exact(arrays, segmented)).values()) < 4 * 2**-8


def shapes_in(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Of every array in a traced program, its inner programs included."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            yield getattr(variable.aval, "shape", ())
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def of_length(length: int, kind: AttentionKind) -> tuple[Any, tuple[Any, ...]]:
    """Attention and its gradient, of one row and head, and the shapes of what they take."""

    def loss(q: jax.Array, k: jax.Array, ids: jax.Array) -> jax.Array:
        return causal_attention(q, k, k, ids, kind=kind).sum()

    shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.value_and_grad(loss, argnums=(0, 1)), (shape, shape, ids)


def largest(kind: AttentionKind, length: int) -> int:
    """Elements of the largest array in the traced program."""
    fn, args = of_length(length, kind)
    found = list(shapes_in(jax.make_jaxpr(fn)(*args).jaxpr))
    assert len(found) > 20
    return max(math.prod(shape) for shape in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [LONG, 2 * LONG + 6])
def test_a_long_row_needs_no_array_of_length_times_length(kind: AttentionKind, length: int) -> None:
    assert largest(kind, length) < length**2
    assert largest("xla", LONG - 1) >= (LONG - 1) ** 2


def test_nor_does_the_compiler_make_one() -> None:
    length = 4 * LONG
    fn, args = of_length(length, "xla")
    memory = jax.jit(fn).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * length**2  # of the smaller type, bfloat16


def test_the_gradient_multiplies_in_the_precision_of_the_model() -> None:
    model, ids = decoder(attention="splash"), jnp.ones((1, 128), jnp.int32)
    graphdef, params = nnx.split(model, nnx.Param)
    program = str(jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graphdef, p)(ids).sum()))(params))
    assert program.count("pallas_call") == 3
    assert program.count("dot_general") == program.count("precision=(Precision.HIGHEST")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_tpus_the_compiler_is_given_the_kernel(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(attention_module, "_platform", lambda mesh: "tpu")
    array, short = (jax.ShapeDtypeStruct((2, size, 4, 64), dtype) for size in (300, 60))

    def lowered(x: jax.ShapeDtypeStruct) -> str:
        traced = jax.jit(jax.grad(lambda q: causal_attention(q, q, q).sum().astype("float32")))
        return traced.trace(x).lower(lowering_platforms=("tpu",)).as_text()

    assert lowered(array).count("tpu_custom_call") == 3  # forward, queries, keys and values
    assert "tpu_custom_call" not in lowered(short)


def decoder(**options: Any) -> Decoder:
    config = DecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    return Decoder(config, rngs=nnx.Rngs(0), **options)


def logits_and_gradients(model: Decoder, ids: jax.Array, segments: jax.Array) -> Any:
    graphdef, params = nnx.split(model, nnx.Param)

    def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(ids, segment_ids=segments)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), logits

    return jax.tree.map(np.asarray, jax.jit(jax.grad(loss, has_aux=True))(params))


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        ((2, 2, 2), ("data", "fsdp", "tensor")),
        ((1, 2, 4), ("data", "fsdp", "tensor")),  # fewer key heads than shards
        ((8,), ("tensor",)),
        ((2, 2, 2), ("fsdp", "context", "tensor")),
        ((8,), ("context",)),  # 140 tokens: as many as one block, which no shard has whole
    ],
)
@pytest.mark.parametrize("kind", ["splash", "xla"])
def test_attention_on_a_mesh_equals_plain_attention_on_one_device(
    sizes: tuple[int, ...], axes: tuple[str, ...], kind: AttentionKind
) -> None:
    rng = new_rng()
    ids = jnp.asarray(rng.integers(0, 96, (4, 140)), jnp.int32)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (4, 140)), axis=1), jnp.int32)
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes))
    wanted = logits_and_gradients(decoder(), ids, segments)
    model = decoder(attention=kind, mesh=mesh, remat="full")
    found = logits_and_gradients(model, ids, segments)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())
    np.testing.assert_allclose(model(ids), decoder()(ids), atol=1e-4)


def test_generation_after_a_prompt_through_the_kernel_gives_the_same_tokens() -> None:
    rng = new_rng()
    prompts = [rng.integers(0, 96, count).tolist() for count in (3, 40, 17)]
    assert generate(decoder(attention="splash"), prompts, max_new_tokens=8) == generate(
        decoder(), prompts, max_new_tokens=8
    )
