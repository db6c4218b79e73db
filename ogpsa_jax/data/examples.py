"""Examples: tokenised rows. A whole data set is read, checked and tokenised before step 0."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ogpsa_jax.countdown import Countdown
from ogpsa_jax.data.reading import and_others, read_records
from ogpsa_jax.data.records import DataSource, Kind, Message, Record
from ogpsa_jax.data.templates import ChatTemplate, Encoded
from ogpsa_jax.errors import InputError

_CHUNK = 512  # records that are tokenised in one call
_TOLD = 20  # refused rows that a report names


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
    """What became of the rows.

    Attributes:
      rows: examples made.
      tokens: in all of them.
      learnt: tokens that are to be learnt.
      truncated: examples cut to the length limit.
      skipped: rows that do not count because of what their format says of them.
      refused: pairs, and rows passed over in a draw, that were left out: place and reason.
    """

    rows: int = 0
    tokens: int = 0
    learnt: int = 0
    truncated: int = 0
    skipped: int = 0
    refused: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Counts for the summary, and the first refused rows by name."""
        counts: dict[str, Any] = {
            "rows": self.rows,
            "tokens": self.tokens,
            "learnt_tokens": self.learnt,
            "truncated_rows": self.truncated,
            "skipped_rows": self.skipped,
            "refused_rows": len(self.refused),
        }
        return {**counts, "refused": self.refused[:_TOLD]} if self.refused else counts


def digest(examples: Sequence[Example], start: bytes = b"") -> str:
    """A hash of every token and whether it is learnt; `start` goes in first."""
    found = hashlib.blake2b(start, digest_size=20)
    for example in examples:
        for tokens in example.sequences:
            found.update(np.int64(len(tokens.ids)).tobytes())
            found.update(np.ascontiguousarray(tokens.ids, np.int32).tobytes())
            found.update(np.ascontiguousarray(tokens.learnt, bool).tobytes())
    return found.hexdigest()


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
        plain text goes on in further rows.
      all_tokens: learn every token but the first, not only the assistant's.
      seed: of the draw where a source asks for some samples.

    Returns:
      The examples, source by source in file order, and the report. Pairs whose answers are equal or
      empty, or whose prompt leaves no room for an answer, are left out and named in the report; so
      are such rows for SFT where only some are drawn.

    Raises:
      InputError: see :func:`ogpsa_jax.data.reading.read_records`; a row with nothing left to learn;
        fewer usable rows than asked for.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, found {max_length}")
    tokenise = partial(_outcomes, template=template, max_length=max_length, all_tokens=all_tokens)
    examples: list[Example] = []
    report = DataReport()
    for number, source in enumerate(sources):
        records, skipped = read_records(source, kind)
        report.skipped += skipped
        outcomes = _drawn(source, records, tokenise, seed)
        told = [outcome.problem for outcome in outcomes if outcome.problem]
        made = [outcome for outcome in outcomes if not outcome.problem]
        # A draw passes over what teaches nothing; who asks for all rows must not lose any unasked.
        if told and (not made or (kind == "sft" and source.samples is None)):
            others = and_others([problem.partition(": ")[0] for problem in told[1:]])
            raise InputError(f"{told[0]}{others}; raise data.max_length, or mend or remove them.")
        report.refused += told
        if source.samples is not None and len(made) < source.samples:
            raise InputError(
                f"{source.path}: {source.samples} samples asked for, but split '{source.split}' "
                f"holds {len(made)} usable rows; ask for at most {len(made)}."
            )
        report.truncated += sum(outcome.truncated for outcome in made)
        examples += [Example(tokens, number) for outcome in made for tokens in outcome.examples]
    report.rows = len(examples)
    for example in examples:
        report.tokens += sum(len(tokens.ids) for tokens in example.sequences)
        report.learnt += sum(int(tokens.learnt.sum()) for tokens in example.sequences)
    return examples, report


@dataclass(frozen=True)
class _Outcome:
    """What a record gives: examples, or the reason why it gives none."""

    examples: tuple[tuple[Tokens, ...], ...] = ()
    truncated: bool = False
    problem: str = ""


def _drawn(
    source: DataSource,
    records: Sequence[Record],
    tokenise: Callable[[Sequence[Record]], list[_Outcome]],
    seed: int,
) -> list[_Outcome]:
    """All records, or as many drawn ones as give the wanted number of examples, in file order."""
    order = np.arange(len(records))
    wanted = len(records)
    if source.samples is not None:
        order = np.random.default_rng(seed).permutation(len(records))
        wanted = source.samples
    outcomes: dict[int, _Outcome] = {}
    made = 0
    countdown = Countdown(f"tokenising {source.path}", wanted, "rows")
    while made < wanted and len(outcomes) < len(records):
        chunk = order[len(outcomes) :][: min(_CHUNK, wanted - made)].tolist()
        found = tokenise([records[i] for i in chunk])
        outcomes.update(zip(chunk, found, strict=True))
        # A record that gives nothing counts all the same where no other takes its place.
        made += sum(source.samples is None or not outcome.problem for outcome in found)
        countdown.at(made)
    return [outcomes[index] for index in sorted(outcomes)]


def _outcomes(
    records: Sequence[Record], *, template: ChatTemplate, max_length: int, all_tokens: bool
) -> list[_Outcome]:
    conversations = [
        (messages, record.where)
        for record in records
        for messages in ([] if record.flaw else _conversations(record))
    ]
    encoded = iter(template.encode_all(conversations))
    outcomes = []
    for record in records:
        if record.flaw:
            outcomes.append(_Outcome(problem=f"{record.where}: {record.flaw}"))
        elif record.text is not None:
            outcomes.append(_Outcome(_pieces(template.encode_text(record.text), max_length)))
        else:
            sequences = [next(encoded) for _ in _conversations(record)]
            outcomes.append(_cut(sequences, record.where, max_length, all_tokens))
    return outcomes


def _conversations(record: Record) -> list[tuple[Message, ...]]:
    if record.text is not None:
        return []
    if record.chosen is None or record.rejected is None:
        return [record.messages]
    answers = (record.chosen, record.rejected)
    return [(*record.messages, Message("assistant", answer)) for answer in answers]


def _cut(sequences: list[Encoded], where: str, max_length: int, all_tokens: bool) -> _Outcome:
    tokens = []
    for ids, learnt in sequences:
        flags = np.arange(len(ids)) > 0 if all_tokens else np.asarray(learnt, bool)
        tokens.append(Tokens(np.asarray(ids[:max_length], np.int32), flags[:max_length]))
    if not all(sequence.learnt[1:].any() for sequence in tokens):
        return _Outcome(
            problem=f"{where}: the prompt alone fills max_length ({max_length} tokens), so nothing "
            "is left to learn"
        )
    longest = max(len(ids) for ids, _ in sequences)
    return _Outcome((tuple(tokens),), truncated=longest > max_length)


def _pieces(ids: list[int], max_length: int) -> tuple[tuple[Tokens, ...], ...]:
    """Rows of a document.

    Each begins with the last token of the one before, so that every token but the document's first
    is learnt once.
    """
    starts = range(0, max(len(ids) - 1, 1), max_length - 1)
    rows = [np.asarray(ids[start : start + max_length], np.int32) for start in starts]
    return tuple((Tokens(row, np.arange(len(row)) > 0),) for row in rows)
