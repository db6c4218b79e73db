"""Hugging Face model folders: finding them, and writing them completely or not at all."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json
from ogpsa_jax.remote import check_local, fetched, is_remote

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
MODEL_CARD = "README.md"
UNROUNDED = "unrounded"  # within an export: the weights as trained, where the export rounds them
WRITTEN = ".ogpsa_jax.json"  # the names of the files that an export wrote
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_folder(path: str | os.PathLike[str]) -> Path:
    """The local folder of a model; an address, or an id on the Hugging Face hub, is fetched.

    Of a run directory, its export.

    Raises:
      InputError: there is no such folder, and no such model on the hub or no way to reach it; or a
        run that has no export.
    """
    if is_remote(path):
        return _export_of(fetched(path, "model"))
    folder = Path(path)
    with contextlib.suppress(RuntimeError):  # ~ of nobody
        folder = folder.expanduser()
    if folder.is_dir():
        return _export_of(folder)
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


def _export_of(folder: Path) -> Path:
    """The export of a run directory; another folder as it is."""
    if (folder / "config.json").exists() or not (folder / "config.yaml").exists():
        return folder
    if not (folder / "export").is_dir():
        raise InputError(
            f"{folder}: this run has no export yet; let it finish, or write its newest checkpoint "
            f"with `ogpsa-jax export {folder} DIR`."
        )
    return folder / "export"


def check_not_of_a_run(target: Path) -> None:
    """Refuse to write where a run keeps its own result, which other commands take for it.

    Raises:
      InputError: ``target`` is the ``export`` or ``adapter`` of a run directory.
    """
    place = target.resolve()
    if place.name in ("export", "adapter") and (place.parent / "config.yaml").exists():
        raise InputError(
            f"{target}: is the {place.name} of the run {place.parent.name}; choose another place."
        )


def keeps_unrounded(folder: Path) -> bool:
    """Whether a model folder also contains its unrounded weights.

    Raises:
      InputError: it was written with them, and they are gone.
    """
    if (folder / UNROUNDED).is_dir():
        return True
    if UNROUNDED in _written(folder):
        raise InputError(
            f"{folder / UNROUNDED}: the weights as trained were written here and are gone; write "
            f"them again with `ogpsa-jax export {folder.parent} {folder}`, or start from the "
            f"rounded ones by exporting to another folder."
        )
    return False


def weights_files(folder: Path) -> list[Path]:
    """The files that contain a model's weights, rounded and not."""
    return [
        *sorted(folder.glob("*.safetensors")),
        *sorted((folder / UNROUNDED).glob("*.safetensors")),
    ]


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A fresh folder that takes the place of ``target`` once the block ends without an error.

    What was written is listed in it, so that the next time nothing else is replaced with it.

    Args:
      target: may exist only as an empty folder, or as one written here before, which it replaces.

    Raises:
      InputError: ``target`` is something else, contains something else, or cannot be written.
    """
    check_local(target, "the folder of the model")
    target = target.resolve()  # of a link, what it leads to
    _check_replaceable(target)
    beside = target.with_name(f".{target.name}.incomplete")
    replaced = target.with_name(f".{target.name}.replaced")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}).") from None
    try:
        yield beside
        written = sorted(path.name for path in beside.iterdir())
        (beside / WRITTEN).write_text(json.dumps(written) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        beside.rename(target)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_replaceable(target: Path) -> None:
    """Refuse what was not written by `written_beside`, or has been added to since."""
    if target.is_dir():
        found = {path.name for path in target.iterdir()} - {WRITTEN}
        names = _written(target)
        # The card is written into an export afterwards.
        others = sorted(found - (names | {MODEL_CARD} if names else names))
        if others:
            raise InputError(
                f"{target}: contains {others[0]}, not written by an export; choose another "
                "place, or move it away."
            )
    elif target.exists():
        raise InputError(f"{target}: is a file; choose another place.")


def _written(folder: Path) -> set[str]:
    """What `written_beside` put into a folder; empty where another wrote it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        names = json.loads((folder / WRITTEN).read_text(encoding="utf-8"))
        if isinstance(names, list):
            return {name for name in names if isinstance(name, str)}
    return set()


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    templates = "additional_chat_templates"
    if (source / templates).is_dir():
        shutil.copytree(source / templates, target / templates)


def chat_template(folder: Path) -> str | None:
    """The chat template of a model folder, in whichever of the places that transformers reads.

    Raises:
      InputError: a file that may contain it is not JSON.
    """
    with contextlib.suppress(OSError):
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        found = read_json(path).get("chat_template") if path.is_file() else None
        if isinstance(found, list):  # several, by name
            named = {item.get("name"): item.get("template") for item in found}
            found = named.get("default")
        if isinstance(found, str):
            return found
    return None
