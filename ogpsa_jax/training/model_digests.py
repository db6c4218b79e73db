"""Digests of a model's files, which identify it."""

from ogpsa_jax.config.origin import about
from ogpsa_jax.config.sections import ModelSection
from ogpsa_jax.models.folders import resolve_folder, weights_files
from ogpsa_jax.runs import fingerprint


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
    settings: list[object] = [version, section.dtype, section.param_dtype]
    with about(key):
        folder = resolve_folder(str(section.path))
    files = [folder / "config.json"]
    if section.initial_weights == "random":
        settings += ["random", seed]
    else:
        files += weights_files(folder)
    if section.lora is not None and section.lora.adapter is not None:
        with about("model.lora.adapter"):
            files += sorted(resolve_folder(section.lora.adapter).glob("adapter_*"))
    return fingerprint(files, *settings).encode()


def weights_digest(path_or_id: str, initial_weights: str = "pretrained") -> str:
    """A digest of a model folder from samples of its files; of random weights, of its config."""
    folder = resolve_folder(path_or_id)
    files = [folder / "config.json"]
    if initial_weights == "pretrained":
        files += weights_files(folder)
    return fingerprint(files, sampled=True)
