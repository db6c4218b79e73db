"""Weight-space merging: a baseline of the paper, ``(1 - w) * A + w * B`` of two checkpoints.

Works on the files, tensor by tensor: beside the result, one tensor of each model is in memory.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json, write_whole
from ogpsa_jax.models.config import read_config
from ogpsa_jax.models.folders import (
    chat_template,
    check_not_of_a_run,
    copy_companions,
    resolve_folder,
    written_beside,
)
from ogpsa_jax.models.safetensors_files import (
    CheckpointReader,
    checkpoint_writer,
    weights_reader,
)

logger = logging.getLogger(__name__)

# What two models may differ in and still compute the same function of their weights.
_FREE_FIELDS = frozenset(
    """initializer_range max_position_embeddings bos_token_id eos_token_ids pad_token_id
    weights_dtype""".split()
)
_TIED = ("model.embed_tokens.weight", "lm_head.weight")


def merge_pretrained(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    weights: Sequence[float],
    outs: Sequence[str | os.PathLike[str]],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the linear merges of two models; each folder appears whole or not at all.

    The models are read once, however many merges are made, and unrounded where an export keeps them
    so. Sums are in float32 and stored in the type that A has; weight 0 gives A and weight 1 gives B
    bit for bit (B in the type of A).

    Args:
      a: Hugging Face folder or hub id; config, tokenizer, chat template and generation settings of
        the merges are its own. Without a chat template, they get that of ``b``; they stop at the
        end-of-sequence tokens of both.
      b: the same; a model of the same architecture.
      weights: the shares of ``b``, in [0, 1].
      outs: a folder for each weight; earlier exports there are replaced.
      max_shard_bytes: largest size of a file.

    Raises:
      InputError: a weight out of range, two models that do not match (the sentence names the tensor
        or the field of the config), or a folder that cannot be read or written.
      ValueError: ``weights`` and ``outs`` differ in length.
    """
    if len(weights) != len(outs):
        raise ValueError(f"outs must be as many as weights ({len(weights)}), got {len(outs)}")
    for weight in weights:
        if not 0 <= weight <= 1:
            raise InputError(f"weight {weight:g}: the share of {b} must be between 0 and 1.")
    first, second = (resolve_folder(path) for path in (a, b))
    places = [Path(out) for out in outs]
    _check_places(places, (first, second))
    templates = chat_template(first), chat_template(second)
    if None not in templates and templates[0] != templates[1]:
        logger.warning(
            "%s and %s have different chat templates; the merge has that of the former",
            *(first, second),
        )
    with (
        CheckpointReader(first) as exported,
        weights_reader(first) as reader,
        weights_reader(second) as other,
    ):
        sources = _match(reader, other, first, second)
        announced = {name: (exported.dtype(name), reader.shape(name)) for name in sources}
        with contextlib.ExitStack() as stack:
            writers = []
            for place in places:
                beside = stack.enter_context(written_beside(place))
                copy_companions(first, beside)
                _keep_chat(first, second, beside)
                shutil.copyfile(first / "config.json", beside / "config.json")
                opened = checkpoint_writer(beside, announced, max_shard_bytes)
                writers.append(stack.enter_context(opened))
            for name, source in sources.items():
                tensors = reader.read(name), other.read(source)
                for weight, writer in zip(weights, writers, strict=True):
                    merged = _merge(*tensors, weight, announced[name][0])
                    if 0 < weight < 1 and not np.isfinite(merged.astype(np.float32)).all():
                        raise InputError(
                            f"{second}: tensor {name} cannot be merged into {merged.dtype}: "
                            "something in it is not finite, or too large."
                        )
                    writer.write(name, merged)


def _keep_chat(first: Path, second: Path, target: Path) -> None:
    """Give a merge the chat template of either model and the stop tokens of both."""
    templates = chat_template(first), chat_template(second)
    if templates[0] is None and templates[1] is not None:
        (target / "chat_template.jinja").write_text(templates[1], encoding="utf-8")
    stops = [read_config(folder).eos_token_ids for folder in (first, second)]
    both = list(dict.fromkeys([*stops[0], *stops[1]]))
    if len(both) > len(stops[0]):
        path = target / "generation_config.json"
        settings = read_json(path) if path.exists() else {}
        write_whole(path, json.dumps({**settings, "eos_token_id": both}, indent=2) + "\n")


def _merge(a: np.ndarray, b: np.ndarray, weight: float, dtype: np.dtype) -> np.ndarray:
    """``(1 - weight) * a + weight * b`` in `dtype`."""
    # Not by the formula: 0 times an infinity is not a number, and -0 + 0 is +0.
    if weight in (0, 1):
        return (b if weight else a).astype(dtype)
    share = np.float32(weight)
    merged = (np.float32(1) - share) * a.astype(np.float32) + share * b.astype(np.float32)
    return np.asarray(merged).astype(dtype)


def _check_places(places: Sequence[Path], inputs: Sequence[Path]) -> None:
    resolved = [place.resolve() for place in places]
    for i, place in enumerate(resolved):
        check_not_of_a_run(places[i])
        if place in resolved[:i]:
            raise InputError(f"{places[i]}: two merges would go there; give each its own folder.")
        for folder in inputs:
            if place == folder.resolve() or folder.resolve() in place.parents:
                raise InputError(
                    f"{places[i]}: is one of the models to merge, or within it; choose another "
                    "place."
                )


def _match(
    reader: CheckpointReader, other: CheckpointReader, first: Path, second: Path
) -> dict[str, str]:
    """The tensors of the merge: name in the first model -> name in the second."""
    configs = read_config(first), read_config(second)
    for field in dataclasses.fields(configs[0]):
        ours, theirs = (getattr(config, field.name) for config in configs)
        if ours != theirs and field.name not in _FREE_FIELDS:
            raise InputError(
                f"{second}: {field.name} is {theirs}, but {ours} in {first}; only models of one "
                "architecture can be merged."
            )
    tied = configs[0].tie_word_embeddings
    sources = {}
    for name in _weights(reader):
        source = name
        # Tied embeddings are stored under either name, or under both.
        if tied and name in _TIED and name not in other:
            source = _TIED[1 - _TIED.index(name)]
        if source not in other:
            raise InputError(f"{second}: tensor {name} is missing, but {first} has it.")
        if reader.shape(name) != other.shape(source):
            raise InputError(
                f"{other.file(source)}: tensor {source} has shape {list(other.shape(source))}, but "
                f"{list(reader.shape(name))} in {first}."
            )
        if not reader.shape(name):
            raise InputError(f"{reader.file(name)}: tensor {name} is a single number, not weights.")
        other.dtype(source)
        sources[name] = source
    for name in _weights(other):
        if name not in reader and not (tied and name in _TIED):
            raise InputError(f"{first}: tensor {name} is missing, but {second} has it.")
    return sources


def _weights(reader: CheckpointReader) -> list[str]:
    # Llama checkpoints of old carry the rotary frequencies along.
    return [name for name in reader.names() if not name.endswith(".rotary_emb.inv_freq")]
