"""Digests of a model's files, which identify it."""

import hashlib

from ogpsa_jax.config.origin import about
from ogpsa_jax.config.sections import ModelSection
from ogpsa_jax.models.folders import resolve_folder, weights_files

_SAMPLE = 1 << 20  # bytes of a weights file that are read at each of three places


def model_key(section: ModelSection, seed: int, version: int, key: str) -> bytes:
    """A digest of a model: precision and files, or what its random weights are drawn from.

    Args:
      section: says which model.
      seed: of random weights.
      version: of what is computed with it.
      key: of the configuration that names it.

    Raises:
      InputError: there is no such model.
    """
    found = hashlib.blake2b(f"{version} {section.dtype} {section.param_dtype}".encode())
    with about(key):
        folder = resolve_folder(str(section.path))
    files = [folder / "config.json"]
    if section.initial_weights == "random":
        found.update(f"random {seed}".encode())
    else:
        files += weights_files(folder)
    if section.lora is not None and section.lora.adapter is not None:
        with about("model.lora.adapter"):
            files += sorted(resolve_folder(section.lora.adapter).glob("adapter_*"))
    for path in files:
        found.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.digest()


def weights_digest(path_or_id: str, initial_weights: str = "pretrained") -> str:
    """A digest of a model folder from samples of its files; of random weights, of its config."""
    found = hashlib.blake2b(digest_size=20)
    folder = resolve_folder(path_or_id)
    files = [folder / "config.json"]
    if initial_weights == "pretrained":
        files += weights_files(folder)
    for path in files:
        size = path.stat().st_size
        found.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(size - _SAMPLE, 0)):
                file.seek(start)
                found.update(file.read(_SAMPLE))
    return found.hexdigest()
