"""Finds the initial model: the model before the first stage of the pipeline."""

import dataclasses
from typing import Any

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.origin import about
from ogpsa_jax.config.sections import ModelSection
from ogpsa_jax.data import load_tokenizer
from ogpsa_jax.errors import InputError
from ogpsa_jax.files import read_json
from ogpsa_jax.models import DecoderConfig
from ogpsa_jax.models.config import read_config
from ogpsa_jax.models.folders import resolve_folder
from ogpsa_jax.runs import RunDir, run_dir_of
from ogpsa_jax.training.model_digests import weights_digest


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """Which model a pipeline began with.

    Attributes:
      section: says how to make it, in this run's precision.
      seed: of random weights.
      own_start: whether it is the one that this stage starts from.
      problem: why it is not the one that was looked for; empty if it is.
    """

    section: ModelSection
    seed: int
    own_start: bool
    problem: str = ""

    @property
    def key(self) -> str:
        """What in the configuration names it."""
        return "model.path" if self.own_start else "references.initial_model"

    @property
    def name(self) -> str:
        """Its folder or hub id."""
        return str(self.section.path)


def find_initial_model(config: RunConfig) -> InitialModel:
    """The model of ``references.initial_model``, or the one that the pipeline began with.

    If a stage starts from the export of a run, that run's directory names the model it started
    from, and so on. If that model is missing or has changed since, the result is the model that
    this stage starts from, and `problem` says so.
    """
    if config.references.initial_model is not None:
        return InitialModel(_named(config, config.references.initial_model), config.seed, False)
    own = InitialModel(config.model, config.seed, True)
    first, run_dir, seen = config, None, set[RunDir]()
    while (found := _exported_by(str(first.model.path))) is not None and found not in seen:
        seen.add(found)
        try:
            first, run_dir = found.config(), found
        except InputError as error:
            return dataclasses.replace(own, problem=_fallback(config, str(error)))
        if first.references.initial_model is not None:
            break
    if run_dir is None:
        return own
    key = "model.path"
    section = first.model
    if first.references.initial_model is not None:
        key, section = "references.initial_model", _named(first, first.references.initial_model)
    began = f"{section.path}, which the run in {run_dir} began with,"
    try:
        recorded = read_json(run_dir.inputs).get(key)
        same = weights_digest(str(section.path), section.initial_weights) == recorded
    except InputError:
        return dataclasses.replace(own, problem=_fallback(config, f"{began} is not found"))
    if not same:
        return dataclasses.replace(own, problem=_fallback(config, f"{began} has changed since"))
    adapted = section.lora is not None and section.lora.adapter is not None
    precision = {"dtype": config.model.dtype, "param_dtype": config.model.param_dtype}
    section = section.model_copy(
        update={**precision, "lora": section.lora if adapted else None}  # fresh ones change nothing
    )
    return InitialModel(section, first.seed, False)


def _named(config: RunConfig, path: str) -> ModelSection:
    update = {"path": path, "initial_weights": "pretrained", "lora": None}
    return config.model.model_copy(update=update)


def _fallback(config: RunConfig, reason: str) -> str:
    return (
        f"the model that this stage starts from ({config.model.path}) is taken for the initial "
        f"model, because {reason.rstrip('.')}; name that one with references.initial_model"
    )


def _exported_by(path: str) -> RunDir | None:
    """The directory of the run that a model is the export of."""
    found = run_dir_of(path)
    if found is None or not (found.export / "config.json").is_file():
        return None
    return RunDir(found.path.resolve())


def check_initial_model(config: RunConfig, model: DecoderConfig, tokenizer: Any) -> None:
    """Refuse a named initial model with other tokens.

    Args:
      config: the run's settings.
      model: the architecture of the model that is trained.
      tokenizer: what the run's data are tokenised with.

    Raises:
      InputError: see :func:`check_vocabulary`.
    """
    name = config.references.initial_model
    if config.asks_initial_model and name is not None:
        check_vocabulary(name, str(config.model.path), model, tokenizer)


def check_vocabulary(name: str, trained: str, model: DecoderConfig, tokenizer: Any) -> None:
    """Refuse an initial model whose predictions are not of this run's tokens.

    Args:
      name: folder or hub id of the initial model.
      trained: that of the model that is trained.
      model: its architecture.
      tokenizer: what the run's data are tokenised with.

    Raises:
      InputError: no such model, another size of the vocabulary, or a tokenizer with other ids.
    """
    with about("references.initial_model"):
        folder = resolve_folder(name)
    size = read_config(folder).vocab_size
    if size != model.vocab_size:
        raise InputError(
            f"references.initial_model: {name} predicts {size} tokens, but {trained} knows "
            f"{model.vocab_size}; name a model with the same vocabulary."
        )
    if not (folder / "tokenizer.json").is_file():
        return
    theirs, ours = load_tokenizer(str(folder)).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        token = min(t for t in {*theirs, *ours} if theirs.get(t) != ours.get(t))
        raise InputError(
            f"references.initial_model: the tokenizer of {name} is not the run's (the id of "
            f"{token!r} is {theirs.get(token)} there and {ours.get(token)} here); name a model "
            "with the same tokenizer."
        )
