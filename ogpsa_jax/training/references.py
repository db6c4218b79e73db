"""Prepares reference rows, with the initial model's answers or predictions if required."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from ogpsa_jax.config import RunConfig
from ogpsa_jax.data import ChatTemplate, DataReport, Example
from ogpsa_jax.models import Decoder
from ogpsa_jax.training.initial_model import check_vocabulary, find_initial_model
from ogpsa_jax.training.initial_outputs import add_predictions, answer_prompts
from ogpsa_jax.training.prepare import RunData, model_config, prepare_model, tokenizer_of

logger = logging.getLogger(__name__)


def prepare_references(
    config: RunConfig, data: RunData, mesh: Mesh, own_start: Callable[[], Decoder]
) -> RunData:
    """What the initial model says of the reference rows, where the run asks for it.

    Args:
      config: the run's settings.
      data: its examples.
      mesh: the devices.
      own_start: makes the model that the stage starts from.

    Raises:
      InputError: the initial model cannot be loaded, or knows another vocabulary.
    """
    if not config.asks_initial_model:
        return data
    found = find_initial_model(config)
    architecture = model_config(config)
    tokenizer = tokenizer_of(config)
    model = own_start
    if not found.own_start:
        check_vocabulary(found.name, str(config.model.path), architecture, tokenizer)
        start = config.model_copy(update={"model": found.section, "seed": found.seed})
        # Made once, and let go of before the model that is trained is made.
        model = functools.cache(functools.partial(prepare_model, start, mesh))
    told: dict[str, Any] = {"initial_model": found.name}
    warnings = [found.problem] if found.problem else []
    references, reports = data.references, dict(data.reports)
    if config.references.answers == "own":
        template = ChatTemplate(tokenizer, config.data.template, date=data.date)
        stops = dict.fromkeys((*architecture.eos_token_ids, *template.stop_tokens()))
        references, counts = answer_prompts(references, found, model, config, tuple(stops))
        told["own_answers"] = counts
        for i, rows in enumerate(references):
            reports[f"references.{i}"] = _recounted(reports[f"references.{i}"], rows)
        if counts["unfinished"] > counts["rows"] / 10:
            warnings.append(
                f"references.answers: {counts['unfinished']} of {counts['rows']} of the initial "
                "model's own answers are cut before their end; raise "
                "references.own_answers.max_new_tokens, or data.max_length"
            )
    if config.references.target == "initial" and config.differentiates_references:
        references, kept = add_predictions(
            references, found, model, config, mesh, architecture.vocab_size
        )
        told |= kept
        if found.own_start and config.references.in_step is None:
            warnings.append(
                "references.target: the divergence from the initial model has no gradient at that "
                "model itself, so nothing can be projected before the second refresh; "
                "set references.in_step"
            )
    for warning in warnings:
        logger.warning("%s", warning)
    return dataclasses.replace(
        data,
        references=references,
        reports=reports,
        initial_model=found,
        initial=told,
        warnings=[*data.warnings, *warnings],
    )


def _recounted(report: DataReport, examples: Sequence[Example]) -> DataReport:
    """The report of prompts, of which answers have been made."""
    sequences = [example.sequences[0] for example in examples]
    return dataclasses.replace(
        report,
        tokens=sum(len(tokens.ids) for tokens in sequences),
        loss_tokens=sum(int(tokens.loss_mask.sum()) for tokens in sequences),
        prompts_alone=0,
    )
