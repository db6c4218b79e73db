"""Names and layouts of parameters here and of tensors in a Hugging Face checkpoint.

Modules are named alike, so a path turns into a name mechanically: ``layers.mlp.up_proj.kernel``
[layers, in, out] is ``model.layers.<i>.mlp.up_proj.weight`` [out, in] for each layer i.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

ParameterPath = tuple[Any, ...]
_ENDINGS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_ADAPTER_ENDINGS = {"a": "lora_A.weight", "b": "lora_B.weight"}


@dataclasses.dataclass(frozen=True)
class TensorName:
    """One tensor of a checkpoint.

    Attributes:
      name: as in the checkpoint.
      path: of the parameter in the ``nnx.State``.
      layer: its index along the parameter's leading axis; ``None``: the parameter is not stacked.
      transposed: whether the checkpoint stores [out, in].
      shape: in the checkpoint.
    """

    name: str
    path: ParameterPath
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def tensor_names(state: nnx.State) -> list[TensorName]:
    """Every checkpoint tensor that the parameters make, in the order of the layers.

    Args:
      state: of a :class:`~ogpsa_jax.models.decoder.Decoder`, abstract or not; adapters are left
        out.
    """
    names = []
    for path, variable in nnx.to_flat_state(state):
        if path[-1] not in _ENDINGS:
            continue
        transposed = path[-1] == "kernel"
        stem = [str(part) for part in path[:-1]]
        ending = _ENDINGS[str(path[-1])]
        shape = tuple(variable.shape)
        if stem[0] != "layers":
            prefix = [] if stem[0] == "lm_head" else ["model"]
            name = ".".join([*prefix, *stem, ending])
            names.append(
                TensorName(name, path, None, transposed, shape[::-1] if transposed else shape)
            )
            continue
        shape = shape[:0:-1] if transposed else shape[1:]
        for layer in range(variable.shape[0]):
            name = ".".join(["model.layers", str(layer), *stem[1:], ending])
            names.append(TensorName(name, path, layer, transposed, shape))
    order = {"embed_tokens": -1, "norm": 1, "lm_head": 2}
    return sorted(
        names, key=lambda tensor: (order.get(tensor.path[0], 0), tensor.layer or 0, tensor.name)
    )


def adapter_names(state: nnx.State) -> list[TensorName]:
    """Every tensor that LoRA adapters make in a folder of ``peft``, in the order of the layers.

    ``layers.mlp.up_proj.lora.a`` [layers, in, rank] is
    ``base_model.model.model.layers.<i>.mlp.up_proj.lora_A.weight`` [rank, in] for each layer i.
    """
    names = []
    for path, variable in nnx.to_flat_state(state):
        if "lora" not in path:
            continue
        stem, ending = [str(part) for part in path[1:-2]], _ADAPTER_ENDINGS[str(path[-1])]
        for layer in range(variable.shape[0]):
            name = ".".join(["base_model.model.model.layers", str(layer), *stem, ending])
            names.append(TensorName(name, path, layer, True, tuple(variable.shape[:0:-1])))
    return sorted(names, key=lambda tensor: (tensor.layer, tensor.name))


def to_huggingface(state: nnx.State) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters, or anything shaped like them, as tensors of a Hugging Face checkpoint.

    One tensor at a time is brought to the host. Where arrays are spread over several processes,
    all of them must consume the iterator together.

    Args:
      state: parameters, gradients, or another ``nnx.State`` of the same structure (or a part of
        it).

    Yields:
      (name, array in the dtype of the parameter).
    """
    arrays = dict(nnx.to_flat_state(state))
    return host_tensors(tensor_names(state), lambda tensor: pick(arrays, tensor))


def host_tensors(
    names: Iterable[TensorName], value: Callable[[TensorName], Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Bring tensors to the host one at a time, as :func:`to_huggingface` does.

    Args:
      names: the tensors.
      value: gives a parameter, or the layer of it that a tensor is, in the layout it has here.
    """
    for tensor in names:
        host = _to_host(value(tensor))
        yield tensor.name, np.ascontiguousarray(host.T if tensor.transposed else host)


def pick(arrays: Mapping[ParameterPath, Any], tensor: TensorName) -> Any:
    """A tensor's parameter, or its layer of it, out of those of a flat state."""
    array = _array(arrays[tensor.path])
    return array if tensor.layer is None else array[tensor.layer]


def _array(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _to_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
