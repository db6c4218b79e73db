"""Hugging Face model folders: finding them, and making them so that they are whole or not there."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ogpsa_jax.errors import InputError

# Everything beside weights and config.json that a checkpoint is used with.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_folder(path: str | os.PathLike[str]) -> Path:
    """The local folder of a model, fetched from the Hugging Face hub if ``path`` is an id there.

    Raises:
      InputError: there is no such folder, and no such model on the hub or no way to reach it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if not _HUB_ID.fullmatch(name) or name.startswith(".") or folder.exists():
        raise InputError(f"{path}: not a folder; give a Hugging Face model folder or a hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*_WEIGHTS, *COMPANIONS]))
    except Exception as error:  # the hub raises errors of many packages: each means the same here
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: neither a local folder nor a model that can be fetched from the Hugging Face "
            f"hub ({reason.rstrip('.')}); check the spelling and the connection."
        ) from None


@contextlib.contextmanager
def written_beside(target: Path, marker: str = "config.json") -> Iterator[Path]:
    """A fresh folder that takes the place of ``target`` once the block ends without an error.

    Args:
      target: may exist only as an empty folder or as one holding ``marker``, which it replaces.
      marker: a file that tells an earlier export from a folder of something else.

    Raises:
      InputError: ``target`` is something else, or cannot be written.
    """
    if target.exists() and not (
        target.is_dir() and (not any(target.iterdir()) or (target / marker).is_file())
    ):
        raise InputError(
            f"{target}: exists and is not an exported folder (no {marker}); choose another place."
        )
    beside = target.with_name(f".{target.name}.incomplete")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}).") from None
    try:
        yield beside
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        beside.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    templates = "additional_chat_templates"
    if (source / templates).is_dir():
        shutil.copytree(source / templates, target / templates)
