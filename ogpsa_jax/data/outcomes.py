"""From a record to examples that fit the length limit, or to the reason why it is skipped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ogpsa_jax.data.examples import Tokens
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

    examples: tuple[tuple[Tokens, ...], ...] = ()
    length: int = 0  # of a conversation, before it was cut
    cut_prompt: bool = False
    split: bool = False
    prompt_alone: bool = False
    problem: str = ""
    remedied: bool = False  # the problem says itself what to do
    too_long: bool = False


def outcomes_of(
    records: Sequence[Record],
    *,
    template: ChatTemplate,
    max_length: int,
    all_tokens: bool,
    cut_prompts: bool,
    leave_room: bool,
) -> list[Outcome]:
    """The outcome of each record.

    Args:
      records: of one source.
      template: of the chat.
      max_length: tokens a row may have.
      all_tokens: learn the prompts too.
      cut_prompts: cut prompts that fill the row; else they are a reason to leave it out.
      leave_room: of prompts alone, ask for room for an answer.
    """
    conversations = [
        (messages, record.where)
        for record in records
        for messages in ([] if record.flaw else _conversations(record))
    ]
    encoded = iter(template.encode_all(conversations))
    outcomes = []
    for record in records:
        if record.flaw:
            outcomes.append(Outcome(problem=f"{record.where}: {record.flaw}"))
        elif record.text is not None:
            outcomes.append(Outcome(_pieces(template.encode_text(record.text), max_length)))
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
    """The record's conversation; of a pair two, in which the last answer alone is trained on."""
    if record.text is not None or record.prompt_alone:
        return []
    if record.chosen is None or record.rejected is None:
        return [record.messages]
    given = as_context(record.messages)
    answers = (record.chosen, record.rejected)
    return [(*given, Message("assistant", answer)) for answer in answers]


def _of_conversations(
    found: Sequence[list[Encoded] | InputError],
    cut: Callable[[list[Encoded]], Outcome],
    all_tokens: bool,
) -> Outcome:
    conversations = []
    for sequences in found:
        if isinstance(sequences, InputError):
            return Outcome(problem=str(sequences).removesuffix("."), remedied=True)
        # The last one contains the whole conversation: the others would teach parts of it again.
        conversations.append(sequences[-1:] if all_tokens else sequences)
    # A pair is one example of two sequences, any other conversation one example for each sequence.
    if len(conversations) > 1:
        return cut([sequences[0] for sequences in conversations])
    parts = [cut([sequence]) for sequence in conversations[0]]
    made = [part for part in parts if not part.problem]
    if not made:
        return parts[0]
    return Outcome(
        tuple(example for part in made for example in part.examples),
        max(len(ids) for ids, _ in conversations[0]),
        cut_prompt=any(part.cut_prompt for part in made),
        split=len(parts) > 1,
    )


def _cut(
    sequences: list[Encoded], where: str, max_length: int, all_tokens: bool, cut_prompts: bool
) -> Outcome:
    whole = []
    for ids, loss_mask in sequences:
        flags = np.arange(len(ids)) > 0 if all_tokens else np.asarray(loss_mask, bool)
        whole.append(Tokens(np.asarray(ids, np.int32), flags))
    tokens = [Tokens(t.ids[:max_length], t.loss_mask[:max_length]) for t in whole]
    longest = max(len(ids) for ids, _ in sequences)
    cut_prompt = not all(sequence.loss_mask[1:].any() for sequence in tokens)
    if cut_prompt and not cut_prompts:
        return Outcome(
            problem=f"{where}: the prompt alone fills data.max_length ({max_length} tokens), so "
            "nothing is left to learn",
            too_long=True,
        )
    if cut_prompt:
        tokens = list(_without_middle(whole, max_length))
    if len(tokens) == 2 and np.array_equal(tokens[0].ids, tokens[1].ids):
        return Outcome(
            problem=f"{where}: chosen and rejected are the same tokens within data.max_length "
            f"({max_length} tokens)"
        )
    return Outcome((tuple(tokens),), longest, cut_prompt=cut_prompt)


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


def _prompt(
    record: Record, template: ChatTemplate, max_length: int, cut_prompts: bool, leave_room: bool
) -> Outcome:
    """A prompt up to where its answer would begin, or as much of it as there may be."""
    ids = np.asarray(template.encode_prompt(record.messages), np.int32)
    if len(ids) < 2:
        return Outcome(problem=f"{record.where}: the prompt has no token to predict")
    too_long = leave_room and len(ids) >= max_length
    if too_long and not cut_prompts:
        return Outcome(
            problem=f"{record.where}: the prompt alone fills data.max_length ({max_length} "
            "tokens), so there is no room for an answer",
            too_long=True,
        )
    kept = max_length - max_length // 2
    cut = np.concatenate([ids[: kept // 2], ids[len(ids) - (kept - kept // 2) :]])
    shown = cut if too_long else ids[:max_length]
    tokens = Tokens(shown, np.arange(len(shown)) > 0)
    return Outcome(((tokens,),), len(ids), cut_prompt=too_long, prompt_alone=True)


def _pieces(ids: list[int], max_length: int) -> tuple[tuple[Tokens, ...], ...]:
    """Rows of a document.

    Each begins with the last token of the one before, so that every token but the document's first
    is trained on once.
    """
    starts = range(0, max(len(ids) - 1, 1), max_length - 1)
    rows = [np.asarray(ids[start : start + max_length], np.int32) for start in starts]
    return tuple((Tokens(row, np.arange(len(row)) > 0),) for row in rows)
