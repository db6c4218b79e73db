"""Reads, checks and tokenises a whole data set before step 0."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np

from ogpsa_jax.data.examples import DataReport, Example
from ogpsa_jax.data.outcomes import Outcome, Tokenizing, outcomes_of
from ogpsa_jax.data.reading import and_others, read_records
from ogpsa_jax.data.records import (
    DataSource,
    Kind,
    Record,
    without_answer,
)
from ogpsa_jax.data.templates import ChatTemplate
from ogpsa_jax.errors import InputError
from ogpsa_jax.progress import quick_bar

TooLong = Literal["refuse", "skip", "cut"]
Answers = Literal["required", "optional", "left out"]
_CHUNK = 512  # records that are tokenised in one call
# How rendered prompts end: Alpaca, Vicuna, Llama 2, Zephyr, ChatML, Llama 3.
_ASKS_ON = re.compile(
    r"(###\s*(response|assistant|answer|output)\s*:?|\n\s*assistant:|\[/INST\]|<\|assistant\|>|"
    r"<\|im_start\|>assistant|<\|end_header_id\|>)\s*$",
    re.IGNORECASE,
)


def prepare(
    sources: Sequence[DataSource],
    template: ChatTemplate,
    *,
    kind: Kind,
    max_length: int,
    all_tokens: bool = False,
    too_long: TooLong = "refuse",
    answers: Answers = "required",
    seed: int = 0,
) -> tuple[list[Example], DataReport]:
    """Read, validate and tokenise whole data sets.

    Args:
      sources: what to read.
      template: turns conversations into tokens.
      kind: ``"sft"`` for sequences, ``"preference"`` for pairs.
      max_length: tokens a row may have; longer conversations are cut at the end and counted, longer
        plain text continues in further rows.
      all_tokens: learn every token but the first, not only the assistant's.
      too_long: what becomes of a row whose prompt alone fills `max_length`. refuse: an error, but a
        draw of some samples passes over it; skip: it is left out and named; cut: tokens are taken
        out of the prompt's middle until the answer has room, at most half of the row, so that the
        template and both ends of what was asked stay (as LongBench does, 2308.14508).
      answers: ``"optional"``: rows may be prompts alone (SFT only), of which every token but the
        first is in the loss mask; ``"left out"``: all rows are taken for such, and leave room for
        at least one token more.
      seed: of the draw where a source asks for some samples.

    Returns:
      The examples, source by source in file order, and the report. Pairs whose answers are equal or
      empty are left out and named in the report.

    Raises:
      InputError: see :func:`ogpsa_jax.data.reading.read_records`; a row with nothing left to learn;
        fewer usable rows than asked for.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, found {max_length}")
    how = Tokenizing(
        template,
        max_length,
        all_tokens,
        cut_prompts=too_long == "cut",
        leave_room=answers == "left out",
    )
    examples: list[Example] = []
    report = DataReport()
    for number, source in enumerate(sources):
        records, skipped, notes = read_records(source, kind, prompts_alone=answers != "required")
        if answers == "left out":
            records = [without_answer(record) for record in records]
        report.skipped += skipped
        report.notes += notes + _rendered(source, records, template)
        outcomes = _drawn(source, records, partial(outcomes_of, source=number, how=how), seed)
        if refused := _refused(outcomes, source, kind, too_long):
            raise InputError(_refusal(refused, too_long))
        _count(outcomes, report, max_length)
        made = [outcome for outcome in outcomes if not outcome.problem]
        if source.samples is not None and len(made) < source.samples:
            raise InputError(
                f"{source.path}: {source.samples} samples asked for, but split '{source.split}' "
                f"contains {len(made)} usable rows; request at most {len(made)}."
            )
        examples += [example for outcome in made for example in outcome.examples]
    report.rows = len(examples)
    for example in examples:
        report.tokens += sum(len(tokens.ids) for tokens in example.sequences)
        report.loss_tokens += sum(int(tokens.loss_mask.sum()) for tokens in example.sequences)
    return examples, report


def _count(outcomes: Sequence[Outcome], report: DataReport, max_length: int) -> None:
    """Add to a report what became of the rows of a source."""
    made = [outcome for outcome in outcomes if not outcome.problem]
    report.refused += [outcome.problem for outcome in outcomes if outcome.problem]
    report.truncated += sum(outcome.length > max_length for outcome in made)
    report.cut_prompts += sum(outcome.cut_prompt for outcome in made)
    report.split += sum(outcome.split for outcome in made)
    report.lengths += [outcome.length for outcome in made if outcome.length]
    report.prompts_alone += sum(outcome.prompt_alone for outcome in made)


def _refused(
    outcomes: Sequence[Outcome], source: DataSource, kind: Kind, too_long: TooLong
) -> list[Outcome]:
    """The rows that end the run.

    A draw passes over what teaches nothing; who asks for all rows must not lose any unasked.
    """
    problems = [outcome for outcome in outcomes if outcome.problem]
    if len(problems) == len(outcomes):
        return problems
    if source.samples is not None:
        return []
    return [
        outcome
        for outcome in problems
        if (too_long == "refuse" if outcome.too_long else kind == "sft")
    ]


def _refusal(refused: Sequence[Outcome], too_long: TooLong) -> str:
    """One sentence for rows that end the run."""
    first, *rest = (outcome.problem for outcome in refused)
    others = and_others([problem.partition(": ")[0] for problem in rest])
    if refused[0].remedied:
        return f"{first}{others}."
    remedy = "fix or remove them"
    if any(outcome.too_long for outcome in refused):
        choices = "data.too_long to " + ("skip or cut" if too_long == "refuse" else "cut")
        remedy = f"raise data.max_length, set {choices}, or {remedy}"
    return f"{first}{others}; {remedy}."


def _rendered(source: DataSource, records: Sequence[Record], template: ChatTemplate) -> list[str]:
    """What to say of prompts that seem to be rendered by a chat template already."""
    ends = template.stop_texts()
    places = []
    for record in records:
        given = [m.content for m in record.messages if m.role != "assistant"]
        if any(end in said for end in ends for said in given) or (
            given and _ASKS_ON.search(given[-1])
        ):
            places.append(record.where)
    if not places:
        return []
    return [
        f"{places[0]}{and_others(places[1:])}: the prompt contains marks of a chat template, "
        "which would be rendered twice; give the plain text, one message for each turn"
    ]


def _drawn(
    source: DataSource,
    records: Sequence[Record],
    tokenise: Callable[[Sequence[Record]], list[Outcome]],
    seed: int,
) -> list[Outcome]:
    """All records, or as many drawn ones as give the wanted number of examples, in file order."""
    order = np.arange(len(records))
    wanted = len(records)
    if source.samples is not None:
        order = np.random.default_rng(seed).permutation(len(records))
        wanted = source.samples
    outcomes: dict[int, Outcome] = {}
    made = 0
    bar = quick_bar(f"tokenising {source.path}", wanted, "rows")
    while made < wanted and len(outcomes) < len(records):
        chunk = order[len(outcomes) :][: min(_CHUNK, wanted - made)].tolist()
        found = tokenise([records[i] for i in chunk])
        outcomes.update(zip(chunk, found, strict=True))
        # A record that gives nothing counts all the same where no other takes its place.
        made += sum(source.samples is None or not outcome.problem for outcome in found)
        bar.at(made)
    return [outcomes[index] for index in sorted(outcomes)]
