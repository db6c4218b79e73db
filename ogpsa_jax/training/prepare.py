"""From a configuration to what the loop needs: first all data, checked, then the model."""

import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.config.origin import about
from ogpsa_jax.config.sections import DataSection, SourceSection
from ogpsa_jax.data import (
    DEFAULT_DATE,
    Answers,
    ChatTemplate,
    DataReport,
    DataSource,
    Example,
    load_tokenizer,
    prepare,
)
from ogpsa_jax.data.reading import told_skipped
from ogpsa_jax.errors import InputError
from ogpsa_jax.models import (
    Decoder,
    DecoderConfig,
    LoraParam,
    add_lora,
    load_lora,
    load_pretrained,
)
from ogpsa_jax.models.config import read_config
from ogpsa_jax.models.folders import resolve_folder
from ogpsa_jax.models.pretrained import check_computable
from ogpsa_jax.remote import is_remote
from ogpsa_jax.training.initial_model import InitialModel, check_initial_model
from ogpsa_jax.training.reference_model import add_reference_log_probs
from ogpsa_jax.training.verdict import judge_lengths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """All examples of a run.

    Attributes:
      train: what is trained on.
      references: reference sets.
      evaluations: held-out sets by name.
      reports: counts, by data set.
      warnings: for the user.
      date: the day that the chat template prints.
      initial_model: which model says what is right on reference rows; None where none is asked.
      initial: what the summary says of it.
    """

    train: list[Example]
    references: list[list[Example]]
    evaluations: dict[str, list[Example]]
    reports: dict[str, DataReport]
    warnings: list[str]
    date: datetime.date = DEFAULT_DATE
    initial_model: InitialModel | None = None
    initial: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, dict[str, int]]:
        """Counts for the summary, by data set."""
        return {name: report.as_dict() for name, report in self.reports.items()}


def data_warnings(reports: Mapping[str, DataReport], section: DataSection, limit: int) -> list[str]:
    """What happened to rows without a request, and which key changes it.

    Args:
      reports: by data set.
      section: its settings.
      limit: tokens that the model can read.
    """
    noted: dict[str, list[str]] = {}  # the same file may be several data sets
    for name, report in reports.items():
        for note in report.notes:
            noted.setdefault(note, []).append(name)
    found = [f"{', '.join(names)}: {note}" for note, names in noted.items()]
    for name, report in reports.items():
        if report.split:
            found.append(
                f"{name}: {report.split} conversations became several examples each, because the "
                "chat template shows an earlier turn otherwise than when it is answered; another "
                "data.template may not"
            )
        if left_out := report.refused:
            others = ", ..." if left_out[1:] else ""
            found.append(
                f"{name}: {len(left_out)} rows are left out ({left_out[0]}{others}); the summary "
                "names them"
            )
        if report.cut_prompts:
            found.append(
                f"{name}: {report.cut_prompts} prompts leave no room for an answer in "
                f"data.max_length ({section.max_length}), so their middle is cut out "
                "(data.too_long: cut)"
            )
        if cut := judge_lengths(name, report.lengths, section.max_length, limit):
            found.append(cut)
    return found


def prepare_data(
    config: RunConfig, model: DecoderConfig, date: datetime.date = DEFAULT_DATE
) -> RunData:
    """Read, validate and tokenise every data set of the run.

    Args:
      config: the run's settings.
      model: the architecture.
      date: what a chat template prints as today's date.

    Raises:
      InputError: anything wrong in any of them, or a tokenizer that does not fit the model.
    """
    if not config.data.train:
        raise InputError("data.train is empty: name at least one data set to train on.")
    if config.data.max_length > model.max_position_embeddings:
        raise InputError(
            f"data.max_length ({config.data.max_length}) exceeds the model's "
            f"max_position_embeddings ({model.max_position_embeddings}); lower it."
        )
    tokenizer = tokenizer_of(config)
    check_initial_model(config, model, tokenizer)
    with about(_tokenizer_key(config) if config.data.template is None else "data.template"):
        template = ChatTemplate(tokenizer, config.data.template, date=date)
    train, references, evaluations = (
        {wanted.name: _read(wanted, config, model, template) for wanted in sets}
        for sets in (_training_sets(config), _reference_sets(config), _held_out_sets(config))
    )
    reports = {name: found[1] for name, found in (train | references | evaluations).items()}
    warnings = data_warnings(reports, config.data, model.max_position_embeddings)
    if template.unknown_end and any(report.lengths for report in reports.values()):
        warnings.append(
            f"data.template: it ends a turn with {template.unknown_end!r}, not a special "
            "token of this tokenizer, so the model learns to write it out, and answers show it; "
            "choose a template that ends turns with one of the tokenizer's own"
        )
    for warning in warnings:
        logger.warning("%s", warning)
    return RunData(
        train["train"][0],
        [examples for examples, _ in references.values()],
        {name.removeprefix("eval."): examples for name, (examples, _) in evaluations.items()},
        reports,
        warnings,
        date,
    )


@dataclass(frozen=True)
class _DataSet:
    """A data set that a run reads.

    Attributes:
      name: of its report.
      sources: what it is read from.
      keys: where the sources stand in the configuration.
      pairs: whether its rows are pairs.
      all_tokens: whether all tokens are in the loss mask.
      answers: whether its rows need answers.
      hint: what an error about its rows ends with.
    """

    name: str
    sources: Sequence[SourceSection]
    keys: Sequence[str]
    pairs: bool
    all_tokens: bool = False
    answers: Answers = "required"
    hint: str = ""


def _training_sets(config: RunConfig) -> list[_DataSet]:
    sources = config.data.train
    keys = [f"data.train.{i}" for i in range(len(sources))]
    return [_DataSet("train", sources, keys, pairs=config.objective == "dpo")]


def _reference_sets(config: RunConfig) -> list[_DataSet]:
    section = config.references
    pairs = section.loss in ("dpo", "official")
    answers: Answers = "required"
    if section.target == "initial" or not config.differentiates_references:
        answers = "optional"
    if section.answers == "own":
        answers = "left out"
    hint = (
        f" (references.loss: {section.loss} needs pairs; `response` and `all_tokens` do not)"
        if pairs
        else ""
    )
    return [
        _DataSet(
            f"references.{i}",
            [source],
            [f"references.sets.{i}"],
            pairs,
            all_tokens=section.loss == "all_tokens",
            answers=answers,
            hint=hint,
        )
        for i, source in enumerate(section.sets if config.projects else ())
    ]


def _held_out_sets(config: RunConfig) -> list[_DataSet]:
    return [
        _DataSet(
            f"eval.{name}",
            [source],
            [f"data.eval.{name}"],
            pairs=source.measure == "preference",
            all_tokens=source.measure == "all_tokens",
        )
        for name, source in config.data.eval.items()
    ]


def _read(
    wanted: _DataSet, config: RunConfig, model: DecoderConfig, template: ChatTemplate
) -> tuple[list[Example], DataReport]:
    """The examples of a data set, whose tokens the model must know, and their report."""
    with _about_one(wanted):
        examples, report = prepare(
            [data_source(source) for source in wanted.sources],
            template,
            kind="preference" if wanted.pairs else "sft",
            max_length=config.data.max_length,
            all_tokens=wanted.all_tokens,
            too_long=config.data.too_long,
            answers=wanted.answers,
            seed=config.seed,
        )
    if report.skipped:
        logger.info("%s: %s", wanted.name, told_skipped(report.skipped))
    largest = max(int(t.ids.max()) for example in examples for t in example.sequences)
    if largest >= model.vocab_size:
        raise InputError(
            f"{_tokenizer_key(config)}: {config.model.tokenizer or config.model.path}: the "
            f"tokenizer gives token {largest}, but the model knows {model.vocab_size}; name its "
            "own tokenizer."
        )
    return examples, report


def _tokenizer_key(config: RunConfig) -> str:
    return "model.path" if config.model.tokenizer is None else "model.tokenizer"


def tokenizer_of(config: RunConfig) -> Any:
    """The tokenizer that is named, or the model's.

    Raises:
      InputError: none there, or not as it must be.
    """
    path = config.model.tokenizer or str(config.model.path)
    with about(_tokenizer_key(config)):
        return load_tokenizer(
            str(resolve_folder(path)) if Path(path).is_dir() or is_remote(path) else path
        )


@contextlib.contextmanager
def _about_one(wanted: _DataSet) -> Iterator[None]:
    """Put the key of the source whose path an error names before it, or that of their list."""
    try:
        yield
    except InputError as error:
        keys = wanted.keys
        named = [
            key
            for source, key in zip(wanted.sources, keys, strict=True)
            if source.path in str(error)
        ]
        key = keys[0] if len(keys) == 1 else keys[0].rpartition(".")[0]
        key = named[0] if len(named) == 1 else key
        sentence = f"{key}: {error}"
        if wanted.hint:
            sentence = f"{sentence.removesuffix('.')}{wanted.hint}."
        raise InputError(sentence) from error


def data_source(section: SourceSection) -> DataSource:
    """The data room's view of a configured source."""
    names = {field.name for field in dataclasses.fields(DataSource)}
    return DataSource(**section.model_dump(include=names))


def model_config(config: RunConfig) -> DecoderConfig:
    """The architecture, from the model folder.

    Raises:
      InputError: no such model, or one that the decoder does not cover.
    """
    if config.model.path is None:
        raise InputError("model.path is missing: name a Hugging Face folder or hub id.")
    with about("model.path"):
        return read_config(resolve_folder(str(config.model.path)))


def prepare_model(config: RunConfig, mesh: Mesh, *, unrounded: bool = True) -> Decoder:
    """The model on its mesh, pre-trained or random, with adapters where the run trains them.

    Args:
      config: the run's settings.
      mesh: the devices.
      unrounded: start from the weights as trained, where the model is the export of a run that
        keeps them; otherwise from what others read there.

    Raises:
      InputError: a checkpoint with missing, extra or mis-shaped tensors.
    """
    section = config.model
    check_computable(section.dtype, "model.dtype")
    options: dict[str, Any] = {
        "dtype": section.dtype,
        "param_dtype": section.param_dtype,
        "remat": config.train.remat,
        "mesh": mesh,
        "attention": section.attention,
    }
    with about("model.path"):
        if section.initial_weights == "pretrained":
            model = load_pretrained(str(section.path), unrounded=unrounded, **options)
        else:
            folder = resolve_folder(str(section.path))
            model = Decoder(read_config(folder), rngs=nnx.Rngs(config.seed), **options)
            model.source = str(folder)
    lora = section.lora
    if lora is not None and lora.rank > model.config.hidden_size:
        raise InputError(
            f"model.lora.rank: {lora.rank} exceeds the model's width, {model.config.hidden_size}; "
            "lower it."
        )
    if lora is not None and lora.adapter is not None:
        with about("model.lora.adapter"):
            load_lora(model, lora.adapter)
        for linear in model.linears().values():
            if linear.lora is not None:
                linear.lora.dropout = lora.dropout
    elif lora is not None:
        add_lora(
            model,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=lora.targets,
            dropout=lora.dropout,
            rngs=nnx.Rngs(config.seed),
        )
    return model


def trained_parameters(config: RunConfig) -> Any:
    """The kind of parameters that are trained: all, or only the adapters."""
    return nnx.Param if config.model.lora is None else LoraParam


def prepare_reference_log_probs(
    config: RunConfig, data: RunData, mesh: Mesh, initial: Callable[[], Decoder]
) -> RunData:
    """What the reference model says of every pair that a preference loss is taken of.

    Args:
      config: the run's settings.
      data: its examples.
      mesh: the devices.
      initial: makes the model that the stage starts from.

    Raises:
      InputError: the reference model cannot be loaded.
    """
    references = data.references if config.references.loss == "dpo" else []
    found = add_reference_log_probs(
        [data.train, *data.evaluations.values(), *references], config, mesh, initial
    )
    held_out = found[1 : 1 + len(data.evaluations)]
    return dataclasses.replace(
        data,
        train=found[0],
        evaluations=dict(zip(data.evaluations, held_out, strict=True)),
        references=found[1 + len(held_out) :] or data.references,
    )
