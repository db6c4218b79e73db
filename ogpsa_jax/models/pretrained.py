"""Hugging Face checkpoints to decoders and back, tensor by tensor.

Import puts every tensor, in the type of the file, where it belongs on the mesh, and writes it into
its place in the stacked parameter there: beside the parameters, one tensor is in memory. Export
reads the parameters back one tensor at a time.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json
from ogpsa_jax.models.config import DecoderConfig, read_config
from ogpsa_jax.models.decoder import Decoder
from ogpsa_jax.models.folders import UNROUNDED, copy_companions, resolve_folder, written_beside
from ogpsa_jax.models.layers import AttentionKind, merged_kernel
from ogpsa_jax.models.names import TensorName, host_tensors, pick, tensor_names
from ogpsa_jax.models.safetensors_files import (
    CheckpointReader,
    checkpoint_writer,
    weights_reader,
)
from ogpsa_jax.models.sharding import ShardingRules
from ogpsa_jax.remat import Remat

_EMBEDDING, _UNEMBEDDING = "model.embed_tokens.weight", "lm_head.weight"


def check_computable(dtype: str, key: str) -> None:
    """Refuse a type that this machine does not compute in; `key` is what asks for it.

    Raises:
      InputError: float16 on a CPU.
    """
    if dtype == "float16" and jax.default_backend() == "cpu":
        raise InputError(f"{key}: a CPU does not compute in float16; use bfloat16 or float32.")


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: str | jnp.dtype = "bfloat16",
    param_dtype: str | jnp.dtype = "float32",
    mesh: Mesh | None = None,
    rules: ShardingRules = ShardingRules(),  # noqa: B008 (frozen)
    remat: Remat = "none",
    attention: AttentionKind = "auto",
    unrounded: bool = False,
) -> Decoder:
    """A decoder with the weights of a Hugging Face folder.

    Args:
      path: a folder with ``config.json`` and safetensors (one file, or several and an index), a
        hub id, or a run directory (its export).
      dtype: type of the computation.
      param_dtype: type the parameters are kept in.
      mesh: where they go, axis types Auto; ``None``: the default device.
      rules: the table from logical axes to mesh axes.
      remat: see :class:`~ogpsa_jax.models.decoder.Decoder`.
      attention: see :class:`~ogpsa_jax.models.decoder.Decoder`.
      unrounded: of an export that keeps its weights unrounded as well, read those: training goes on
        from them. Otherwise what transformers reads.

    Raises:
      InputError: the folder, its config or a tensor (missing, unexpected, of a wrong shape or
        type) is not as it must be; the sentence names the file and the field or tensor.
    """
    folder = resolve_folder(path)
    config = read_config(folder)
    with weights_reader(folder) if unrounded else CheckpointReader(folder) as reader:
        graphdef, abstract = nnx.split(
            abstract_decoder(
                config,
                dtype=dtype,
                param_dtype=param_dtype,
                mesh=mesh,
                rules=rules,
                remat=remat,
                attention=attention,
            )
        )
        names = tensor_names(abstract)
        sources = _match(reader, names, folder, config)
        by_path: dict[Any, list[TensorName]] = {}
        for tensor in names:
            by_path.setdefault(tensor.path, []).append(tensor)
        flat = []
        for parameter_path, variable in nnx.to_flat_state(abstract):
            value = load_parameter(reader, by_path[parameter_path], sources, variable, mesh, rules)
            flat.append((parameter_path, variable.replace(value)))
    model: Decoder = nnx.merge(graphdef, nnx.from_flat_state(flat))
    model.source = str(folder)
    return model


def abstract_decoder(config: DecoderConfig, **options: Any) -> Decoder:
    """A decoder of shapes and types only: no memory, no devices.

    Args:
      config: the architecture.
      **options: as for :class:`~ogpsa_jax.models.decoder.Decoder`, without ``rngs``.
    """
    model: Decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))
    return model


def _match(
    reader: CheckpointReader, names: list[TensorName], folder: Path, config: DecoderConfig
) -> dict[str, str]:
    """Find each expected tensor, before any is read; our name -> name in the checkpoint."""
    sources = {tensor.name: tensor.name for tensor in names}
    if config.tie_word_embeddings and _EMBEDDING not in reader and _UNEMBEDDING in reader:
        sources[_EMBEDDING] = _UNEMBEDDING
    for tensor in names:
        source = sources[tensor.name]
        if source not in reader:
            raise InputError(
                f"{folder}: tensor {source} is missing from the checkpoint, but config.json calls "
                "for it; fetch the weights again or correct the config."
            )
        if reader.shape(source) != tensor.shape:
            raise InputError(
                f"{reader.file(source)}: tensor {source} has shape {list(reader.shape(source))}, "
                f"but config.json calls for {list(tensor.shape)}."
            )
        reader.dtype(source)
    known = set(sources.values())
    for name in reader.names():
        # Llama checkpoints of old carry the rotary frequencies along.
        if name in known or name.endswith(".rotary_emb.inv_freq"):
            continue
        if config.tie_word_embeddings and name == _UNEMBEDDING:
            _check_tied(reader)
            continue
        raise InputError(
            f"{reader.file(name)}: tensor {name} is not part of a {config.model_type} model as "
            "config.json describes it; correct the config or remove the tensor."
        )
    return sources


def _check_tied(reader: CheckpointReader) -> None:
    same = reader.shape(_EMBEDDING) == reader.shape(_UNEMBEDDING) and np.array_equal(
        reader.read(_EMBEDDING), reader.read(_UNEMBEDDING)
    )
    if not same:
        raise InputError(
            f"{reader.file(_UNEMBEDDING)}: tensor {_UNEMBEDDING} differs from {_EMBEDDING}, but "
            "config.json says that they are tied; set tie_word_embeddings to false."
        )


def load_parameter(
    reader: CheckpointReader,
    tensors: list[TensorName],
    sources: Mapping[str, str],
    variable: Any,
    mesh: Mesh | None,
    rules: ShardingRules,
) -> jax.Array:
    """Read the tensors of one parameter, each straight to the devices that need a part of it."""
    shape, dtype = tuple(variable.shape), jnp.dtype(variable.dtype)
    first = tensors[0]
    whole, single = None, None
    if mesh is not None:
        spec = rules.spec(variable.get_metadata()["out_sharding"], shape, mesh)
        whole = NamedSharding(mesh, spec)
        parts = tuple(spec) if first.layer is None else tuple(spec)[1:]
        parts = parts[::-1] if first.transposed else parts
        single = NamedSharding(mesh, PartitionSpec(*parts))  # type: ignore[no-untyped-call]
    if first.layer is None:
        tensor = _place(reader, sources[first.name], single)
        return _convert(first.transposed, dtype, whole)(tensor)
    stack: jax.Array = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=whole)()
    store = _store(first.transposed, whole)
    for described in tensors:
        tensor = _place(reader, sources[described.name], single)
        stack = store(stack, tensor, np.int32(described.layer or 0))
    # Do not read ahead of the devices: what waits for them is on the host twice.
    return stack.block_until_ready()


def _place(reader: CheckpointReader, name: str, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(reader.read(name))
    return jax.make_array_from_callback(
        reader.shape(name), sharding, lambda index: reader.read(name, index)
    )


@functools.cache
def _convert(transposed: bool, dtype: jnp.dtype, sharding: NamedSharding | None) -> Any:
    return jax.jit(
        lambda tensor: (tensor.T if transposed else tensor).astype(dtype), out_shardings=sharding
    )


@functools.cache
def _store(transposed: bool, sharding: NamedSharding | None) -> Any:
    def store(stack: jax.Array, tensor: jax.Array, layer: jax.Array) -> jax.Array:
        tensor = (tensor.T if transposed else tensor).astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, tensor, layer, axis=0)

    return jax.jit(store, donate_argnums=0, out_shardings=sharding)


def save_pretrained(
    model: Decoder,
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    source: str | os.PathLike[str] | None = None,
    keep_unrounded: bool = False,
) -> bool:
    """Write a folder that transformers and vLLM load; it appears whole or not at all.

    With several processes all of them must call it; the first writes.

    Args:
      model: its weights are written; LoRA adapters are merged into them on the way, tensor by
        tensor (:func:`~ogpsa_jax.models.lora.save_lora` writes the adapters alone).
      path: the folder; an earlier export there is replaced.
      dtype: ``float32``, ``bfloat16`` or ``float16`` for all tensors. By default each tensor keeps
        the type it had in the source, so that what was not trained comes out bit for bit as it
        went in; without a source, the type of the parameter.
      max_shard_bytes: largest size of a file.
      source: a Hugging Face folder whose config, tokenizer, chat template and generation settings
        go with the weights; by default the one the model was loaded from.
      keep_unrounded: where tensors are rounded, write them unrounded too, into the folder
        ``unrounded`` within, for :func:`load_pretrained` with ``unrounded=True``.

    Returns:
      Whether tensors were rounded: their type is narrower than that of the parameters (of merged
      adapters: than float32).

    Raises:
      InputError: ``path`` cannot be written or has something else; or a weight is too large for
        float16.
      ValueError: an unknown ``dtype``.
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or None, got {dtype!r}")
    origin = source if source is not None else model.source
    folder = Path(origin) if origin is not None and Path(origin).is_dir() else None
    state = nnx.state(model, nnx.Param)
    tensors = _announce(model.config, state, dtype, folder)
    exact = _exact(model, state)
    rounds = any(jnp.promote_types(exact[n][0], tensors[n][0]) != tensors[n][0] for n in exact)
    if jax.process_index() == 0:
        with written_beside(Path(path)) as beside:
            if folder is not None:
                copy_companions(folder, beside)
            config = _config_json(model.config, folder, next(iter(tensors.values()))[0])
            text = json.dumps(config, indent=2) + "\n"
            (beside / "config.json").write_text(text, encoding="utf-8")
            with contextlib.ExitStack() as stack:
                writer = stack.enter_context(checkpoint_writer(beside, tensors, max_shard_bytes))
                beside_it = None
                if rounds and keep_unrounded:
                    (beside / UNROUNDED).mkdir()
                    beside_it = stack.enter_context(
                        checkpoint_writer(beside / UNROUNDED, exact, max_shard_bytes)
                    )
                for name, array in _merged_tensors(model):
                    writer.write(name, _round(name, array, tensors[name][0]))
                    if beside_it is not None:
                        beside_it.write(name, array)
    else:
        for _ in _merged_tensors(model):  # takes part in bringing tensors together
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")
    return rounds


def _round(name: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = array.astype(dtype, copy=False)
    if dtype == np.float16 and bool((np.isinf(rounded) & np.isfinite(array)).any()):
        raise InputError(
            f"tensor {name} has {float(np.abs(array).max()):.3g}, more than float16 can; export "
            "in bfloat16 or float32 (`export.dtype`, or `ogpsa-jax export RUN DIR --dtype`)."
        )
    return rounded


def _exact(model: Decoder, state: nnx.State) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor that :func:`_merged_tensors` gives."""
    variables = dict(nnx.to_flat_state(state))
    merged = {
        (*path, "kernel") for path, linear in model.linears().items() if linear.lora is not None
    }
    return {
        tensor.name: (
            np.dtype(np.float32 if tensor.path in merged else variables[tensor.path].dtype),
            tensor.shape,
        )
        for tensor in tensor_names(state)
    }


def _merged_tensors(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the checkpoint, adapters merged into their kernels, those in float32."""
    state = nnx.state(model, nnx.Param)
    arrays = dict(nnx.to_flat_state(state))
    adapters = {(*path, "kernel"): linear.lora for path, linear in model.linears().items()}

    def value(tensor: TensorName) -> Any:
        weight, adapter = pick(arrays, tensor), adapters.get(tensor.path)
        if adapter is None:
            return weight
        layer = tensor.layer
        weight = weight.astype(jnp.float32)
        return merged_kernel(weight, adapter.a[layer], adapter.b[layer], adapter.scale)

    return host_tensors(tensor_names(state), value)


def _announce(
    config: DecoderConfig, state: nnx.State, dtype: str | None, folder: Path | None
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor to be written."""
    variables = dict(nnx.to_flat_state(state))
    names = tensor_names(state)
    dtypes: dict[str, np.dtype] = {}
    if dtype is None and folder is not None:
        try:
            with CheckpointReader(folder) as reader:
                dtypes = {
                    name.name: reader.dtype(name.name) for name in names if name.name in reader
                }
        except InputError:
            pass  # a folder with a tokenizer and no weights will do
    chosen = dtype or config.weights_dtype
    return {
        name.name: (
            dtypes.get(name.name, np.dtype(jnp.dtype(chosen or variables[name.path].dtype))),
            name.shape,
        )
        for name in names
    }


def _config_json(config: DecoderConfig, folder: Path | None, dtype: np.dtype) -> dict[str, Any]:
    """The source's own config where it describes this model, so that nothing in it gets lost."""
    raw = config.to_huggingface()
    if folder is not None and (folder / "config.json").is_file() and read_config(folder) == config:
        raw = read_json(folder / "config.json")
    key = "torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"
    return {**raw, key: dtype.name}
