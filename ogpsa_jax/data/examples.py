"""Examples: tokenised rows. A whole data set is read, checked and tokenised before step 0."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from ogpsa_jax.countdown import Countdown
from ogpsa_jax.data.reading import and_others, read_records
from ogpsa_jax.data.records import (
    DataSource,
    Kind,
    Message,
    Record,
    as_context,
    without_answer,
)
from ogpsa_jax.data.templates import ChatTemplate, Encoded
from ogpsa_jax.errors import InputError

TooLong = Literal["refuse", "skip", "cut"]
Answers = Literal["required", "optional", "left out"]
_CHUNK = 512  # records that are tokenised in one call
# How rendered prompts end: Alpaca, Vicuna, Llama 2, Zephyr, ChatML, Llama 3.
_ASKS_ON = re.compile(
    r"(###\s*(response|assistant|answer|output)\s*:?|\n\s*assistant:|\[/INST\]|<\|assistant\|>|"
    r"<\|im_start\|>assistant|<\|end_header_id\|>)\s*$",
    re.IGNORECASE,
)
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
class Predictions:
    """What a teacher predicts of one sequence: a row for each token that is to be learnt.

    Attributes:
      ids: int32 ``[learnt tokens, k]``, its likeliest tokens.
      log_probs: float32 ``[learnt tokens, k]``.
      rest: float32 ``[learnt tokens]``, logarithm of the mass of all other tokens.
    """

    ids: np.ndarray
    log_probs: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True)
class Example:
    """One sequence, or two (chosen, rejected) for a pair.

    Attributes:
      sequences: their tokens.
      source: the number of the data set it is from.
      reference_logps: of chosen and rejected, by the reference model of a preference loss.
      teacher: of a single sequence, what it is compared with instead of its tokens.
    """

    sequences: tuple[Tokens, ...]
    source: int = 0
    reference_logps: tuple[float, float] | None = None
    teacher: Predictions | None = None

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
      cut_prompts: those of them whose prompt was cut, because it left no room for an answer.
      lengths: tokens of every conversation before it was cut.
      split: conversations that came to several examples, because the template shows an earlier turn
        otherwise than when it is answered.
      skipped: rows that say of themselves that they do not count, by the way they say it.
      prompts_alone: rows without an answer, whose own tokens are learnt.
      refused: pairs, and rows passed over in a draw, that were left out: place and reason.
      notes: sentences on what of the rows is not used.
    """

    rows: int = 0
    tokens: int = 0
    learnt: int = 0
    truncated: int = 0
    cut_prompts: int = 0
    lengths: list[int] = field(default_factory=list)
    split: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prompts_alone: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Counts for the summary, why rows are skipped, and the first refused rows by name."""
        counts: dict[str, Any] = {
            "rows": self.rows,
            "tokens": self.tokens,
            "learnt_tokens": self.learnt,
            "truncated_rows": self.truncated,
            "cut_prompts": self.cut_prompts,
            "skipped_rows": self.skipped.total(),
            "refused_rows": len(self.refused),
        }
        if self.split:
            counts["split_rows"] = self.split
        if self.prompts_alone:
            counts["prompts_alone"] = self.prompts_alone
        if self.skipped:
            counts["skipped"] = dict(self.skipped)
        if self.refused:
            counts["refused"] = self.refused[:_TOLD]
        return counts


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
        plain text goes on in further rows.
      all_tokens: learn every token but the first, not only the assistant's.
      too_long: what becomes of a row whose prompt alone fills `max_length`. refuse: an error, but a
        draw of some samples passes over it; skip: it is left out and named; cut: tokens are taken
        out of the prompt's middle until the answer has room, at most half of the row, so that the
        template and both ends of what was asked stay (as LongBench does, 2308.14508).
      answers: ``"optional"``: rows may be prompts alone (SFT only), of which every token but the
        first is to be learnt; ``"left out"``: all rows are taken for such, and leave room for at
        least one token more.
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
    tokenise = partial(
        _outcomes,
        template=template,
        max_length=max_length,
        all_tokens=all_tokens,
        cut_prompts=too_long == "cut",
        leave_room=answers == "left out",
    )
    examples: list[Example] = []
    report = DataReport()
    for number, source in enumerate(sources):
        found = read_records(source, kind, prompts_alone=answers != "required")
        records, skipped, notes = found
        if answers == "left out":
            records = [without_answer(record) for record in records]
        report.skipped += skipped
        report.notes += notes + _rendered(source, records, template)
        outcomes = _drawn(source, records, tokenise, seed)
        told = [outcome.problem for outcome in outcomes if outcome.problem]
        made = [outcome for outcome in outcomes if not outcome.problem]
        # A draw passes over what teaches nothing; who asks for all rows must not lose any unasked.
        refused = [
            outcome
            for outcome in outcomes
            if outcome.problem
            and source.samples is None
            and (too_long == "refuse" if outcome.too_long else kind == "sft")
        ]
        if told and not made:
            refused = [outcome for outcome in outcomes if outcome.problem]
        if refused:
            raise InputError(_refusal(refused, too_long))
        report.refused += told
        if source.samples is not None and len(made) < source.samples:
            raise InputError(
                f"{source.path}: {source.samples} samples asked for, but split '{source.split}' "
                f"holds {len(made)} usable rows; ask for at most {len(made)}."
            )
        report.truncated += sum(outcome.length > max_length for outcome in made)
        report.cut_prompts += sum(outcome.cut_prompt for outcome in made)
        report.split += sum(outcome.split for outcome in made)
        report.lengths += [outcome.length for outcome in made if outcome.length]
        report.prompts_alone += sum(outcome.prompt_alone for outcome in made)
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
    length: int = 0  # of a conversation, before it was cut
    cut_prompt: bool = False
    split: bool = False
    prompt_alone: bool = False
    problem: str = ""
    remedied: bool = False  # the problem says itself what to do
    too_long: bool = False


def _refusal(refused: Sequence[_Outcome], too_long: TooLong) -> str:
    """One sentence for rows that end the run."""
    first, *rest = (outcome.problem for outcome in refused)
    others = and_others([problem.partition(": ")[0] for problem in rest])
    if refused[0].remedied:
        return f"{first}{others}."
    remedy = "mend or remove them"
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
        f"{places[0]}{and_others(places[1:])}: what is asked holds the marks of a chat template, "
        "which is then applied to it a second time; give the plain text, with one turn a message"
    ]


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
    records: Sequence[Record],
    *,
    template: ChatTemplate,
    max_length: int,
    all_tokens: bool,
    cut_prompts: bool,
    leave_room: bool,
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
        elif record.prompt_alone:
            outcomes.append(_prompt(record, template, max_length, cut_prompts, leave_room))
        else:
            found = [next(encoded) for _ in _conversations(record)]
            cut = partial(
                _cut,
                where=record.where,
                max_length=max_length,
                all_tokens=all_tokens,
                cut_prompts=cut_prompts,
            )
            outcomes.append(_of_conversations(found, cut, all_tokens))
    return outcomes


def _conversations(record: Record) -> list[tuple[Message, ...]]:
    """The record's conversation; of a pair two, in which the last answer alone is learnt."""
    if record.text is not None or record.prompt_alone:
        return []
    if record.chosen is None or record.rejected is None:
        return [record.messages]
    given = as_context(record.messages)
    answers = (record.chosen, record.rejected)
    return [(*given, Message("assistant", answer)) for answer in answers]


def _of_conversations(
    found: Sequence[list[Encoded] | InputError],
    cut: Callable[[list[Encoded]], _Outcome],
    all_tokens: bool,
) -> _Outcome:
    conversations = []
    for sequences in found:
        if isinstance(sequences, InputError):
            return _Outcome(problem=str(sequences).removesuffix("."), remedied=True)
        # The last one holds the whole conversation: the others would teach parts of it again.
        conversations.append(sequences[-1:] if all_tokens else sequences)
    # A pair is one example of two sequences, any other conversation one example for each sequence.
    if len(conversations) > 1:
        return cut([sequences[0] for sequences in conversations])
    parts = [cut([sequence]) for sequence in conversations[0]]
    made = [part for part in parts if not part.problem]
    if not made:
        return parts[0]
    return _Outcome(
        tuple(example for part in made for example in part.examples),
        max(len(ids) for ids, _ in conversations[0]),
        cut_prompt=any(part.cut_prompt for part in made),
        split=len(parts) > 1,
    )


def _cut(
    sequences: list[Encoded], where: str, max_length: int, all_tokens: bool, cut_prompts: bool
) -> _Outcome:
    whole = []
    for ids, learnt in sequences:
        flags = np.arange(len(ids)) > 0 if all_tokens else np.asarray(learnt, bool)
        whole.append(Tokens(np.asarray(ids, np.int32), flags))
    tokens = [Tokens(t.ids[:max_length], t.learnt[:max_length]) for t in whole]
    longest = max(len(ids) for ids, _ in sequences)
    cut_prompt = not all(sequence.learnt[1:].any() for sequence in tokens)
    if cut_prompt and not cut_prompts:
        return _Outcome(
            problem=f"{where}: the prompt alone fills data.max_length ({max_length} tokens), so "
            "nothing is left to learn",
            too_long=True,
        )
    if cut_prompt:
        tokens = list(_without_middle(whole, max_length))
    if len(tokens) == 2 and np.array_equal(tokens[0].ids, tokens[1].ids):
        return _Outcome(
            problem=f"{where}: chosen and rejected are the same tokens within data.max_length "
            f"({max_length} tokens)"
        )
    return _Outcome((tuple(tokens),), longest, cut_prompt=cut_prompt)


def _without_middle(whole: Sequence[Tokens], max_length: int) -> tuple[Tokens, ...]:
    """Rows whose prompt is too long, with as much of it as leaves the answers room."""
    starts = [int(np.argmax(tokens.learnt)) for tokens in whole]
    answers = max(len(t.ids) - start for t, start in zip(whole, starts, strict=True))
    kept = max_length - min(answers, max_length // 2)  # tokens of the prompt
    found = []
    for tokens, start in zip(whole, starts, strict=True):
        order = np.arange(len(tokens.ids))
        if start > kept:
            head = kept // 2
            order = np.concatenate([order[:head], order[start - (kept - head) :]])
        order = order[:max_length]
        found.append(Tokens(tokens.ids[order], tokens.learnt[order]))
    return tuple(found)


def _prompt(
    record: Record, template: ChatTemplate, max_length: int, cut_prompts: bool, leave_room: bool
) -> _Outcome:
    """A prompt up to where its answer would begin, or as much of it as there may be."""
    ids = np.asarray(template.encode_prompt(record.messages), np.int32)
    if len(ids) < 2:
        return _Outcome(problem=f"{record.where}: the prompt has no token to predict")
    too_long = leave_room and len(ids) >= max_length
    if too_long and not cut_prompts:
        return _Outcome(
            problem=f"{record.where}: the prompt alone fills data.max_length ({max_length} "
            "tokens), so there is no room for an answer",
            too_long=True,
        )
    kept = max_length - max_length // 2
    cut = np.concatenate([ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]])
    shown = cut if too_long else ids[:max_length]
    tokens = Tokens(shown, np.arange(len(shown)) > 0)
    return _Outcome(((tokens,),), len(ids), cut_prompt=too_long, prompt_alone=True)


def _pieces(ids: list[int], max_length: int) -> tuple[tuple[Tokens, ...], ...]:
    """Rows of a document.

    Each begins with the last token of the one before, so that every token but the document's first
    is learnt once.
    """
    starts = range(0, max(len(ids) - 1, 1), max_length - 1)
    rows = [np.asarray(ids[start : start + max_length], np.int32) for start in starts]
    return tuple((Tokens(row, np.arange(len(row)) > 0),) for row in rows)
