"""LoRA (arXiv 2106.09685): low-rank adapters on a decoder, and folders of them that ``peft`` reads.

Adapters are variables of the kind :data:`LoraParam`, so that
``nnx.split(model, LoraParam, ...)`` parts what is trained from what is frozen.
"""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json
from ogpsa_jax.models.decoder import Decoder
from ogpsa_jax.models.folders import written_beside
from ogpsa_jax.models.layers import Adapter, LoraParam, merged_kernel
from ogpsa_jax.models.names import TensorName, adapter_names, host_tensors, pick
from ogpsa_jax.models.pretrained import load_parameter
from ogpsa_jax.models.safetensors_files import CheckpointReader, checkpoint_writer

__all__ = ["TARGETS", "LoraParam", "add_lora", "load_lora", "merge_lora", "save_lora"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of an adapter_config.json that are read here, or change nothing in what the adapter computes.
_HARMLESS_KEYS = frozenset(
    """auto_mapping base_model_name_or_path bias exclude_modules inference_mode init_lora_weights
    layers_pattern lora_alpha lora_dropout megatron_core peft_type peft_version qalora_group_size r
    revision target_modules task_type""".split()
)
# Other initialisations change the weights of the base model as well.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def add_lora(
    model: Decoder,
    *,
    rank: int,
    alpha: float,
    targets: Iterable[str] = TARGETS,
    dropout: float = 0.0,
    rngs: nnx.Rngs,
) -> None:
    """Add adapters to linear maps of a model, in place; its outputs do not change.

    A linear map ``x @ kernel`` becomes ``x @ kernel + alpha / rank * dropout(x) @ a @ b`` with
    ``a`` drawn as ``peft`` draws it and ``b`` zero, both kept in the model's ``param_dtype`` and
    sharded like the kernel. Dropout happens only where the model is called with ``dropout_keys``.

    Args:
      model: has no adapters yet.
      rank: of the adapters.
      alpha: their scale, times the rank.
      targets: which linear maps get one, among :data:`TARGETS`; those of all layers.
      dropout: probability with which an element of an adapter's input is zeroed.
      rngs: randomness of the initial ``a``.

    Raises:
      ValueError: an unknown target or none, a number out of its range, or a model with adapters.
    """
    chosen = set(targets)
    unknown = sorted(chosen.difference(TARGETS))
    if unknown or not chosen:
        raise ValueError(f"targets must be among {', '.join(TARGETS)}, got {unknown or 'none'}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if _adapters(model):
        raise ValueError("model must have no adapters yet; merge_lora makes one without")
    for path, linear in model.linears().items():
        if path[-1] in chosen:
            linear.lora = Adapter(linear, rank, alpha, dropout, model.placement, rngs)


def merge_lora(model: Decoder) -> Decoder:
    """A model without adapters that computes the same: ``kernel + alpha / rank * a @ b``.

    Args:
      model: stays as it is.

    Returns:
      A model whose adapted kernels are new, summed in float32 and kept in the type of the
      parameters; all its other arrays are those of ``model``.
    """
    merged: Decoder = nnx.clone(model)
    for linear in merged.linears().values():
        adapter = linear.lora
        if adapter is None:
            continue
        kernel = linear.kernel[...]
        value = _merge(kernel.sharding)(kernel, adapter.a[...], adapter.b[...], adapter.scale)
        linear.kernel.set_value(value)
        linear.lora = None
    return merged


@functools.cache
def _merge(sharding: jax.sharding.Sharding) -> Any:
    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
        # Layer by layer, so that only one is in float32.
        return jax.lax.map(lambda layer: merged_kernel(*layer, scale), (kernel, a, b))

    return jax.jit(merge, out_shardings=sharding)


def save_lora(model: Decoder, path: str | os.PathLike[str]) -> None:
    """Write the adapters as a folder that ``peft`` loads; it appears whole or not at all.

    With several processes all of them must call it; the first writes.

    Args:
      model: its adapters are written, in the type of the parameters.
      path: the folder; an earlier export of adapters there is replaced.

    Raises:
      InputError: ``path`` cannot be written or contains something else.
      ValueError: the model has no adapters.
    """
    adapters = _adapters(model)
    if not adapters:
        raise ValueError("model must have adapters, got one without")
    state = nnx.state(model, LoraParam)
    arrays, names = dict(nnx.to_flat_state(state)), adapter_names(state)
    tensors = host_tensors(names, lambda tensor: pick(arrays, tensor))
    if jax.process_index() == 0:
        announced = {
            tensor.name: (np.dtype(arrays[tensor.path].dtype), tensor.shape) for tensor in names
        }
        with written_beside(Path(path)) as beside:
            text = json.dumps(_peft_config(model, adapters), indent=2) + "\n"
            (beside / _CONFIG).write_text(text, encoding="utf-8")
            size = 2**63 - 1  # peft knows one file only
            with checkpoint_writer(beside, announced, size, single=_WEIGHTS) as writer:
                for name, array in tensors:
                    writer.write(name, array)
    else:
        for _ in tensors:  # takes part in bringing tensors together
            pass
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_lora")


def load_lora(model: Decoder, path: str | os.PathLike[str]) -> None:
    """Load the adapters of a folder of ``peft`` or :func:`save_lora` into a model, in place.

    Args:
      model: the base model; has no adapters yet.
      path: contains ``adapter_config.json`` and ``adapter_model.safetensors``, float32, float16 or
        bfloat16.

    Raises:
      InputError: the folder is not whole, does not fit the model, or has what is not supported
        (a bias, DoRA, ranks that differ, further trained modules, ...); the sentence names it. The
        model is then as it was.
      ValueError: the model has adapters.
    """
    if _adapters(model):
        raise ValueError("model must have no adapters yet; merge_lora makes one without")
    folder = Path(path).expanduser()
    config = _read_peft_config(folder / _CONFIG)
    adapted: Decoder = nnx.clone(model)
    with CheckpointReader(folder, single=_WEIGHTS) as reader:
        add_lora(
            adapted,
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=_targets(config, reader, folder),
            dropout=config.get("lora_dropout", 0.0),
            rngs=nnx.Rngs(0),
        )
        state = nnx.state(adapted, LoraParam)
        names = adapter_names(state)
        _check_tensors(reader, names, folder / _WEIGHTS)
        sources = {tensor.name: tensor.name for tensor in names}
        mesh, rules = model.placement.mesh, model.placement.rules
        for parameter_path, variable in nnx.to_flat_state(state):
            tensors = [tensor for tensor in names if tensor.path == parameter_path]
            value = load_parameter(reader, tensors, sources, variable, mesh, rules)
            adapter = adapted.linears()[parameter_path[:-2]].lora
            getattr(adapter, parameter_path[-1]).set_value(value)
    for linear, donor in zip(model.linears().values(), adapted.linears().values(), strict=True):
        linear.lora = donor.lora


def _adapters(model: Decoder) -> dict[str, Adapter]:
    """The adapters by the name of the linear map they belong to."""
    return {
        path[-1]: linear.lora for path, linear in model.linears().items() if linear.lora is not None
    }


def _peft_config(model: Decoder, adapters: dict[str, Adapter]) -> dict[str, Any]:
    first = next(iter(adapters.values()))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "target_modules": list(adapters),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _read_peft_config(path: Path) -> dict[str, Any]:
    config = read_json(path)

    def refuse(field: str, expected: str) -> InputError:
        return InputError(f"{path}: {field} is {config.get(field)!r}, but {expected}.")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "only LORA is supported")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "trained biases are not supported; train with bias none")
    if config.get("init_lora_weights") not in _HARMLESS_INITS:
        raise refuse(
            "init_lora_weights",
            "it changes the base weights as well; convert the adapter with peft's "
            "path_initial_model_for_weight_conversion",
        )
    for field in sorted(set(config) - _HARMLESS_KEYS):
        if config[field]:
            raise refuse(field, "this is not supported; merge the adapter with peft instead")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise refuse("r", "a whole number of at least 1 was expected")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or alpha <= 0:
        raise refuse("lora_alpha", "a positive number was expected")
    dropout = config.setdefault("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise refuse("lora_dropout", "a number in [0, 1) was expected")
    return config


def _targets(config: dict[str, Any], reader: CheckpointReader, folder: Path) -> list[str]:
    """What has tensors, and what the config lists by name; the latter may also be a pattern."""
    parts = {part for name in reader.names() for part in name.split(".")}
    listed = config.get("target_modules")
    parts.update(listed if isinstance(listed, list) else ())
    targets = [name for name in TARGETS if name in parts]
    if not targets:
        raise InputError(
            f"{folder / _WEIGHTS}: has adapters of none of {', '.join(TARGETS)}, and others are "
            "not supported."
        )
    return targets


def _check_tensors(reader: CheckpointReader, names: list[TensorName], file: Path) -> None:
    """Refuse missing, mis-shaped and unexpected tensors before any is read."""
    for tensor in names:
        if tensor.name not in reader:
            raise InputError(
                f"{file}: tensor {tensor.name} is missing; adapters must cover all layers of the "
                "model they were trained on."
            )
        if reader.shape(tensor.name) != tensor.shape:
            raise InputError(
                f"{file}: tensor {tensor.name} has shape {list(reader.shape(tensor.name))}, but "
                f"the model and {_CONFIG} call for {list(tensor.shape)}."
            )
        reader.dtype(tensor.name)
    for name in sorted(set(reader.names()) - {tensor.name for tensor in names}):
        raise InputError(
            f"{file}: tensor {name} is not part of adapters on {', '.join(TARGETS)} of this model."
        )
