"""Hugging Face folders of trained models, with the tokenizer and template of their training."""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ogpsa_jax.config import RunConfig
from ogpsa_jax.data import ChatTemplate
from ogpsa_jax.files import read_json
from ogpsa_jax.models import Decoder, save_pretrained
from ogpsa_jax.models.folders import copy_companions, resolve_folder
from ogpsa_jax.training.prepare import tokenizer_of

_TEMPLATE, _GENERATION = "chat_template.jinja", "generation_config.json"


def export(
    config: RunConfig,
    model: Decoder,
    target: str | Path,
    *,
    keep_unrounded: bool = False,
) -> bool:
    """:func:`save_pretrained` with the template and stop tokens of the training.

    With ``data.template`` and ``model.tokenizer`` in place of what the model came with, and the
    token that ends an answer among those that generation stops at.

    Args:
      config: what it was trained with.
      model: its weights are written; its stop tokens are completed.
      target: the folder; an earlier export there is replaced.
      keep_unrounded: where it rounds, also keep the weights as trained: what a later stage starts
        from.

    Returns:
      Whether it rounds.

    Raises:
      InputError: the folder cannot be written, or tokenizer or template are gone.
    """
    template = ChatTemplate(tokenizer_of(config), config.data.template)
    dtype = None if config.export.dtype == "auto" else config.export.dtype
    options: Any = {"dtype": dtype, "keep_unrounded": keep_unrounded}
    known = model.config.eos_token_ids
    taught = dict.fromkeys((*known, *template.stop_tokens()))
    model.config = dataclasses.replace(model.config, eos_token_ids=tuple(taught))
    own = template.exported == template.source and not config.data.template
    changed = config.model.tokenizer or not own or len(taught) > len(known)
    if model.source is None or not changed:
        return save_pretrained(model, target, **options)
    with _companions(config, Path(model.source), template, list(taught)) as source:
        return save_pretrained(model, target, source=source, **options)


@contextlib.contextmanager
def _companions(
    config: RunConfig, origin: Path, template: ChatTemplate, stops: list[int]
) -> Iterator[Path]:
    """The folder that the model is from, as if it had been made for this conversation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = resolve_folder(config.model.tokenizer) if config.model.tokenizer else origin
        copy_companions(own, folder)
        for path in (origin / "config.json", *origin.glob("*.safetensors*")):
            (folder / path.name).symlink_to(path.resolve())
        if config.data.template or template.exported != template.source:
            (folder / _TEMPLATE).write_text(str(template.exported), encoding="utf-8")
        generation = origin / _GENERATION
        settings = read_json(generation) if generation.exists() else {}
        text = json.dumps({**settings, "eos_token_id": stops}, indent=2) + "\n"
        (folder / _GENERATION).write_text(text, encoding="utf-8")
        yield folder
