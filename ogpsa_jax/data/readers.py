"""Readers of rows with one answer: from a row to its prompt and its answer.

Each reader turns one row into a record, or into :class:`Skipped` where the row says of itself that
it does not count (HaluEval's hallucinated answers, messages of weight 0).
"""

from collections.abc import Callable, Mapping
from typing import Any

from ogpsa_jax.data.fields import SYSTEM
from ogpsa_jax.data.records import Message, Record, Row, Skipped, as_context, text_of
from ogpsa_jax.data.turns import (
    conversation,
    in_order,
    is_transcript,
    parse_turns,
    same_turns,
    transcript,
)
from ogpsa_jax.errors import InputError

Reader = Callable[[Row, str], Record | Skipped]

PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))


def given_turns(
    row: Row, ask: str, where: str, answer: Message | None = None
) -> tuple[Message, ...]:
    """The given part of a row whose answer stands elsewhere; it ends with a user's turn.

    Args:
      row: the row.
      ask: the column of the prompt: text, a transcript or a list of turns.
      where: of the row, for the message.
      answer: what the list of turns may end with all the same.
    """
    asked: Any = row.get(ask)
    if isinstance(asked, list):
        turns = conversation(asked, where)
        if answer is not None and same_turns(turns[-1:], (answer,)):
            turns = turns[:-1]
    elif ask == "prompt" and is_transcript(asked, answered=False):
        turns = transcript(asked, where, ask, answered=False)
    else:
        asked = text_of(row, ask, where)
        for more in ("input", "context")[: 2 if ask == "instruction" else 1]:  # Alpaca's, Dolly's
            if more != ask and row.get(more):
                asked += "\n" + text_of(row, more, where, empty=True)
        turns = (*_history(row.get("history"), where), Message("user", asked))
    if turns[-1].role != "user":
        raise InputError(
            f"{where}: the turns before the answer must end with a user's turn; fix the row."
        )
    return with_system(row, where, turns)


def _history(history: Any, where: str) -> tuple[Message, ...]:
    """Earlier rounds of an alpaca row: ``[[question, answer], ...]``."""
    if not history:
        return ()
    rounds = history if isinstance(history, list) else [None]
    turns = []
    for pair in rounds:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(
                f"{where}: 'history' must be a list of [question, answer] pairs; fix the row."
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return conversation(turns, where)


def with_system(row: Row, where: str, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns, led by the row's system message.

    Raises:
      InputError: the row contains two different ones.
    """
    own = turns[0].content if turns[0].role == "system" else ""
    found = [text_of(row, key, where, empty=True) for key in SYSTEM if row.get(key)]
    said = list(dict.fromkeys(text for text in [own, *found] if text.strip()))
    if len({text.strip() for text in said}) > 1:
        raise InputError(f"{where}: the row has two different system messages; keep one of them.")
    return turns if own or not said else (Message("system", said[0]), *turns)


def agrees(row: Row, column: str, where: str, given: tuple[Message, ...]) -> None:
    """Refuse a row with a prompt in a column that its conversation contradicts."""
    asked = row.get(column)
    users = [_plain(m.content) for m in given if m.role == "user"]
    if isinstance(asked, str) and asked.strip():
        said = _plain(asked)
        same = any(said in user for user in users) or all(user in said for user in users)
    elif isinstance(asked, list) and asked:
        turns = parse_turns(asked, where)
        same = [_plain(m.content) for m in turns if m.role == "user"] in (users, users[:1])
    else:
        return
    if not same:
        raise InputError(
            f"{where}: '{column}' is not what the user says in the row's conversation; fix the "
            "row or remove the column."
        )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def answered(
    row: Row, where: str, given: tuple[Message, ...], *answers: Message
) -> Record | Skipped:
    """A conversation for SFT, unless nothing of it is in the loss mask."""
    messages = in_order((*given, *answers), where)
    if messages[-1].role != "assistant":
        raise InputError(f"{where}: the last turn must be the assistant's; fix the row.")
    if not any(m.trained for m in messages if m.role == "assistant"):
        return Skipped("none of its answers is in the loss mask (weight 0)")
    for chosen, rejected in PAIRS:
        said = messages[-1].content.strip()
        if said == _last_text(row.get(rejected)) and said != _last_text(row.get(chosen)):
            return Skipped(f"its answer is the one in '{rejected}'")
    return Record(where, messages)


def _last_text(value: Any) -> Any:
    """What a column says, or the last of its turns."""
    turn = value[-1] if isinstance(value, list) and value else value
    said = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else turn
    return said.strip() if isinstance(said, str) else None


def ask_and_answer(ask: str, answer: str) -> Reader:
    """A reader of rows that ask in one column and answer in another, with texts or messages.

    All turns of the answer are trained on, and those of an alpaca row's history, but no turn of the
    prompt.
    """

    def read(row: Row, where: str) -> Record | Skipped:
        given = given_turns(row, ask, where)
        given = given if row.get("history") else as_context(given)
        value = row.get(answer)
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, list) and value:
            return answered(row, where, given, *parse_turns(value, where))
        return answered(row, where, given, Message("assistant", text_of(row, answer, where)))

    return read


def turns_in(column: str) -> Reader:
    """A reader of whole conversations: ``[{role, content}]`` or ``[{from, value}]``."""

    def read(row: Row, where: str) -> Record | Skipped:
        turns = conversation(row.get(column), where)
        given = turns[:-1] if turns[-1].role == "assistant" else turns
        agrees(row, "prompt", where, given)
        return answered(row, where, with_system(row, where, turns))

    return read


def text(row: Row, where: str) -> Record:
    """``{text}``: trained on from its first token to its end."""
    return Record(where, text=text_of(row, "text", where))


def halueval(row: Row, where: str) -> Record | Skipped:
    """HaluEval general data ``{user_query, chatgpt_response, hallucination}``; keeps "no"."""
    verdict = row.get("hallucination")
    if verdict not in ("yes", "no"):
        raise InputError(
            f"{where}: 'hallucination' must be yes or no, found {verdict!r}; fix the row."
        )
    if verdict == "yes":
        return Skipped("'hallucination' says that the answer is bad")
    given = with_system(row, where, (Message("user", text_of(row, "user_query", where)),))
    answer = Message("assistant", text_of(row, "chatgpt_response", where))
    return answered(row, where, given, answer)
