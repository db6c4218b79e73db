"""Examples: tokenised rows. A whole data set is read, checked and tokenised before step 0."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ogpsa_jax.data.reading import read_records
from ogpsa_jax.data.records import DataSource, Kind, Message, Record
from ogpsa_jax.data.templates import ChatTemplate
from ogpsa_jax.errors import InputError


@dataclass(frozen=True)
class Tokens:
    """One sequence.

    Attributes:
      ids: int32 ``[length]``.
      learnt: bool ``[length]``: whether the token there is to be learnt.
    """

    ids: np.ndarray
    learnt: np.ndarray


@dataclass(frozen=True)
class Example:
    """One sequence, or two (chosen, rejected) for a pair."""

    sequences: tuple[Tokens, ...]
    source: int = 0
    reference_logps: tuple[float, float] | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(tokens.ids) for tokens in self.sequences)


@dataclass
class DataReport:
    """What became of the rows."""

    rows: int = 0
    tokens: int = 0
    learnt: int = 0
    truncated: int = 0
    refused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, int]:
        """Counts for the summary."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "learnt_tokens": self.learnt,
            "truncated_rows": self.truncated,
            "refused_rows": len(self.refused),
        }


def prepare(
    sources: Sequence[DataSource],
    template: ChatTemplate,
    *,
    kind: Kind,
    max_length: int,
    all_tokens: bool = False,
    seed: int = 0,
) -> tuple[list[Example], DataReport]:
    """Read, validate and tokenise whole data sets.

    Args:
      sources: what to read.
      template: turns conversations into tokens.
      kind: ``"sft"`` for sequences, ``"preference"`` for pairs.
      max_length: tokens a row may have; longer conversations are cut at the end and counted, longer
        plain text is cut into several rows.
      all_tokens: learn every token but the first, not only the assistant's.
      seed: of the draw where a source asks for some samples.

    Returns:
      The examples, source by source, and the report.

    Raises:
      InputError: see :func:`ogpsa_jax.data.reading.read_records`; a row with nothing left to learn.
    """
    examples: list[Example] = []
    report = DataReport()
    for number, source in enumerate(sources):
        before = len(examples)
        for record in read_records(source, kind, seed):
            if kind == "preference":
                found = _pair(record, template, max_length, report)
            else:
                found = _single(record, template, max_length, report)
            for sequences in found:
                if all_tokens:
                    sequences = tuple(Tokens(t.ids, _all_but_first(t.ids)) for t in sequences)
                examples.append(Example(sequences, number))
        if len(examples) == before:
            raise InputError(
                f"{source.path}: no row is left to learn from: {'; '.join(report.refused[:3])}."
            )
    report.rows = len(examples)
    for example in examples:
        report.tokens += sum(len(tokens.ids) for tokens in example.sequences)
        report.learnt += sum(int(tokens.learnt.sum()) for tokens in example.sequences)
    return examples, report


def _all_but_first(ids: np.ndarray) -> np.ndarray:
    return np.arange(len(ids)) > 0


def _tokens(ids: list[int], learnt: list[bool]) -> Tokens:
    return Tokens(np.asarray(ids, np.int32), np.asarray(learnt, bool))


def _single(
    record: Record, template: ChatTemplate, max_length: int, report: DataReport
) -> list[tuple[Tokens, ...]]:
    if record.text is not None:
        tokenizer = template.tokenizer
        ids = [*tokenizer(record.text, verbose=False).input_ids]
        if ids[-1] != tokenizer.eos_token_id:
            ids.append(tokenizer.eos_token_id)
        pieces = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        return [
            (_tokens(piece, [i > 0 for i in range(len(piece))]),)
            for piece in pieces
            if len(piece) > 1
        ]
    return [(_cut(list(record.messages), template, max_length, record.where, report),)]


def _pair(
    record: Record, template: ChatTemplate, max_length: int, report: DataReport
) -> list[tuple[Tokens, ...]]:
    """Chosen and rejected; rows that teach nothing are refused and counted."""
    answers = [record.chosen or "", record.rejected or ""]
    if answers[0].strip() == answers[1].strip():
        report.refused.append(f"{record.where}: chosen and rejected are equal")
        return []
    truncated = report.truncated
    try:
        return [
            tuple(
                _cut(
                    [*record.messages, Message("assistant", answer)],
                    template,
                    max_length,
                    record.where,
                    report,
                )
                for answer in answers
            )
        ]
    except _NothingLeft as error:
        report.truncated = truncated
        report.refused.append(str(error))
        return []


class _NothingLeft(InputError):
    """The prompt alone fills the row."""


def _cut(
    messages: list[Message], template: ChatTemplate, max_length: int, where: str, report: DataReport
) -> Tokens:
    ids, learnt = template.encode(messages, where)
    if len(ids) > max_length:
        report.truncated += 1
        ids, learnt = ids[:max_length], learnt[:max_length]
        if not any(learnt[1:]):
            raise _NothingLeft(
                f"{where}: the prompt alone exceeds max_length ({max_length} tokens), so nothing "
                "is left to learn; raise data.max_length or remove the row."
            )
    return _tokens(ids, learnt)
