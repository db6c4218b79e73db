"""From a record to examples that fit the length limit, or to the reason why it is skipped."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ogpsa_jax.data.examples import Example, Tokens
from ogpsa_jax.data.records import (
    Message,
    Record,
    as_context,
)
from ogpsa_jax.data.templates import ChatTemplate, Encoded
from ogpsa_jax.errors import InputError


@dataclass(frozen=True)
class Outcome:
    """The examples of a record, or the reason why it has none."""

    examples: tuple[Example, ...] = ()
    length: int = 0  # of a conversation, before it was cut
    cut_prompt: bool = False
    split: bool = False
    prompt_alone: bool = False
    problem: str = ""
    remedied: bool = False  # the problem says itself what to do
    too_long: bool = False


@dataclass(frozen=True)
class Tokenizing:
    """How records become examples.

    Attributes:
      template: of the chat.
      max_length: tokens a row may have.
      all_tokens: learn the prompts too.
      cut_prompts: cut prompts that fill the row; else they are a reason to leave it out.
      leave_room: of prompts alone, ask for room for an answer.
    """

    template: ChatTemplate
    max_length: int
    all_tokens: bool
    cut_prompts: bool
    leave_room: bool


def outcomes_of(records: Sequence[Record], source: int, how: Tokenizing) -> list[Outcome]:
    """The outcome of each record of a source; all are tokenised in one call."""
    conversations = [_conversations(record) for record in records]
    encoded = iter(
        how.template.encode_all(
            [
                (messages, record.where)
                for record, asked in zip(records, conversations, strict=True)
                for messages in asked
            ]
        )
    )
    return [
        _outcome(record, [next(encoded) for _ in asked], source, how)
        for record, asked in zip(records, conversations, strict=True)
    ]


def _conversations(record: Record) -> list[tuple[Message, ...]]:
    """The record's conversation; of a pair two, in which the last answer alone is trained on."""
    if record.flaw or record.text is not None or record.prompt_alone:
        return []
    if record.chosen is None or record.rejected is None:
        return [record.messages]
    given = as_context(record.messages)
    answers = (record.chosen, record.rejected)
    return [(*given, Message("assistant", answer)) for answer in answers]


def _outcome(
    record: Record, encoded: list[list[Encoded] | InputError], source: int, how: Tokenizing
) -> Outcome:
    if record.flaw:
        return Outcome(problem=f"{record.where}: {record.flaw}")
    if record.text is not None:
        rows = _pieces(how.template.encode_text(record.text), how.max_length)
        return Outcome(tuple(Example((tokens,), source) for tokens in rows))
    if record.prompt_alone:
        return _prompt(record, source, how)
    conversations: list[list[Encoded]] = []
    for sequences in encoded:
        if isinstance(sequences, InputError):
            return Outcome(problem=str(sequences).removesuffix("."), remedied=True)
        # The last one contains the whole conversation: the others would teach parts of it again.
        conversations.append(sequences[-1:] if how.all_tokens else sequences)
    # A pair is one example of two sequences, any other conversation one example for each sequence.
    if len(conversations) > 1:
        return _cut([sequences[0] for sequences in conversations], record.where, source, how)
    parts = [_cut([sequence], record.where, source, how) for sequence in conversations[0]]
    made = [part for part in parts if not part.problem]
    if not made:
        return parts[0]
    return Outcome(
        tuple(example for part in made for example in part.examples),
        max(len(ids) for ids, _ in conversations[0]),
        cut_prompt=any(part.cut_prompt for part in made),
        split=len(parts) > 1,
    )


def _cut(sequences: list[Encoded], where: str, source: int, how: Tokenizing) -> Outcome:
    """An example of these sequences, within the length that there is."""
    limit = how.max_length
    whole = []
    for ids, loss_mask in sequences:
        flags = np.arange(len(ids)) > 0 if how.all_tokens else np.asarray(loss_mask, bool)
        whole.append(Tokens(np.asarray(ids, np.int32), flags))
    tokens = [Tokens(t.ids[:limit], t.loss_mask[:limit]) for t in whole]
    longest = max(len(ids) for ids, _ in sequences)
    cut_prompt = not all(sequence.loss_mask[1:].any() for sequence in tokens)
    if cut_prompt and not how.cut_prompts:
        return Outcome(
            problem=f"{where}: the prompt alone fills data.max_length ({limit} tokens), so "
            "nothing is left to learn",
            too_long=True,
        )
    if cut_prompt:
        tokens = list(_without_middle(whole, limit))
    if len(tokens) == 2 and np.array_equal(tokens[0].ids, tokens[1].ids):
        return Outcome(
            problem=f"{where}: chosen and rejected are the same tokens within data.max_length "
            f"({limit} tokens)"
        )
    return Outcome((Example(tuple(tokens), source),), longest, cut_prompt=cut_prompt)


def _without_middle(whole: Sequence[Tokens], max_length: int) -> tuple[Tokens, ...]:
    """Rows whose prompt is too long, with as much of it as leaves the answers room."""
    starts = [int(np.argmax(tokens.loss_mask)) for tokens in whole]
    answers = max(len(t.ids) - start for t, start in zip(whole, starts, strict=True))
    kept = max_length - min(answers, max_length // 2)  # tokens of the prompt
    found = []
    for tokens, start in zip(whole, starts, strict=True):
        order = np.arange(len(tokens.ids))
        if start > kept:
            head = kept // 2
            order = np.concatenate([order[:head], order[start - (kept - head) :]])
        order = order[:max_length]
        found.append(Tokens(tokens.ids[order], tokens.loss_mask[order]))
    return tuple(found)


def _prompt(record: Record, source: int, how: Tokenizing) -> Outcome:
    """A prompt up to where its answer would begin, or as much of it as there may be."""
    limit = how.max_length
    ids = np.asarray(how.template.encode_prompt(record.messages), np.int32)
    if len(ids) < 2:
        return Outcome(problem=f"{record.where}: the prompt has no token to predict")
    too_long = how.leave_room and len(ids) >= limit
    if too_long and not how.cut_prompts:
        return Outcome(
            problem=f"{record.where}: the prompt alone fills data.max_length ({limit} "
            "tokens), so there is no room for an answer",
            too_long=True,
        )
    kept = limit - limit // 2
    cut = np.concatenate([ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]])
    shown = cut if too_long else ids[:limit]
    example = Example((Tokens(shown, np.arange(len(shown)) > 0),), source)
    return Outcome((example,), len(ids), cut_prompt=too_long, prompt_alone=True)


def _pieces(ids: list[int], max_length: int) -> list[Tokens]:
    """Rows of a document.

    Each begins with the last token of the one before, so that every token but the document's first
    is trained on once.
    """
    starts = range(0, max(len(ids) - 1, 1), max_length - 1)
    rows = [np.asarray(ids[start : start + max_length], np.int32) for start in starts]
    return [Tokens(row, np.arange(len(row)) > 0) for row in rows]
