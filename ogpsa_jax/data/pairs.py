"""Readers of pairs: a chosen and a rejected answer to one prompt."""

from collections.abc import Mapping

from ogpsa_jax.data.readers import PAIRS, Reader, agrees, answered, given_turns, with_system
from ogpsa_jax.data.records import Message, Record, Row, Skipped, text_of
from ogpsa_jax.data.turns import (
    conversation,
    in_order,
    is_transcript,
    parse_turns,
    same_turns,
    transcript,
)
from ogpsa_jax.errors import InputError

TURNS = ("messages", "conversations")


def pku_saferlhf(row: Row, where: str) -> Record | Skipped:
    """PKU-SafeRLHF pairs: ``response: [safe, unsafe]``, or the published columns.

    Of the published rows those count that contain one safe answer and one unsafe one; where nothing
    says what is safe, the answer that is called the safer or the better one is chosen.
    """
    given = given_turns(row, "prompt", where)
    if "response" in row:
        pair = row["response"]
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{where}: 'response' must be a pair [safe, unsafe]; fix the row.")
        safe, unsafe = (text_of({"response": said}, "response", where, empty=True) for said in pair)
        return Record(where, given, chosen=safe, rejected=unsafe)
    answers, is_safe = _published_answers(row, where)
    safer = _choice(row, "safer_response_id", where) if _known(row, "safer_response_id") else None
    if not is_safe:
        chosen = _choice(row, "better_response_id", where) if safer is None else safer
    elif all(is_safe):
        return Skipped("both of its answers are safe")
    elif not any(is_safe):
        return Skipped("neither of its answers is safe")
    else:
        chosen = is_safe.index(True)
        if safer not in (None, chosen):
            return Skipped("'safer_response_id' names the unsafe answer")
    return Record(where, given, chosen=answers[chosen], rejected=answers[1 - chosen])


def pku_saferlhf_sft(row: Row, where: str) -> Record | Skipped:
    """PKU-SafeRLHF for SFT: the safe answer, of two safe ones the better."""
    answers, is_safe = ([], []) if "response" in row else _published_answers(row, where)
    if all(is_safe) and is_safe:
        answer = answers[_choice(row, "better_response_id", where)]
        given = given_turns(row, "prompt", where)
        return answered(row, where, given, _said(answer, "response", where))
    pair = pku_saferlhf(row, where)
    return pair if isinstance(pair, Skipped) else _chosen(pair)


def _published_answers(row: Row, where: str) -> tuple[list[str], list[bool]]:
    answers = [text_of(row, f"response_{i}", where, empty=True) for i in (0, 1)]
    flags = [f"is_response_{i}_safe" for i in (0, 1)]
    return answers, [_flag(row, key, where) for key in flags if _known(row, *flags)]


def _known(row: Row, *keys: str) -> bool:
    """Whether any of the columns contains something; CSV and Parquet contain empty ones."""
    return any(row.get(key) not in (None, "") for key in keys)


def _flag(row: Row, key: str, where: str) -> bool:
    value = {"true": True, "false": False}.get(str(row.get(key)).lower())  # CSV contains text
    if value is None:
        raise InputError(
            f"{where}: '{key}' must be true or false, found {row.get(key)!r}; fix the row."
        )
    return value


def _choice(row: Row, key: str, where: str) -> int:
    if str(row.get(key)) not in ("0", "1"):
        raise InputError(f"{where}: '{key}' must be 0 or 1, found {row.get(key)!r}; fix the row.")
    return int(row[key])


def pair_after(ask: str | None) -> Reader:
    """A reader of pairs: texts, messages, or whole conversations.

    The prompt stands in the column `ask`, or at the beginning of both answers' own columns; where
    it stands in several places, they must agree.
    """

    def read(row: Row, where: str) -> Record | Skipped:
        columns = next((pair for pair in PAIRS if set(pair) <= set(row)), PAIRS[0])
        (given, chosen), (other, rejected) = (_side(row, key, where) for key in columns)
        if not same_turns(given, other):
            raise InputError(
                f"{where}: '{columns[0]}' and '{columns[1]}' answer different prompts; fix or "
                "remove the row."
            )
        if given:
            given = with_system(row, where, given)
        elif ask is not None:
            given = given_turns(row, ask, where, chosen if ask in TURNS else None)
        else:
            raise InputError(
                f"{where}: '{columns[0]}' must be a transcript of 'Human:' and 'Assistant:' turns "
                "where no column contains the prompt; fix or remove the row."
            )
        for column in dict.fromkeys([ask, "prompt"] if ask in (None, *TURNS) else [ask]):
            if column is not None and column not in TURNS:
                agrees(row, column, where, given)
        for column in TURNS:
            if row.get(column):
                _same_conversation(row, column, where, (*given, chosen))
        if not chosen.trained or not rejected.trained:
            return Skipped("none of its answers is in the loss mask (weight 0)")
        return Record(where, given, chosen=chosen.content, rejected=rejected.content)

    return read


def _side(row: Row, key: str, where: str) -> tuple[tuple[Message, ...], Message]:
    """What precedes one answer of a pair in its own column, if anything, and the answer."""
    value = row.get(key)
    if is_transcript(value, answered=True):
        turns = transcript(str(value), where, key)
        return turns[:-1], turns[-1]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        return (), Message("assistant", text_of(row, key, where, empty=True))
    turns = parse_turns(value, where, empty_end=True)
    if turns[-1].role != "assistant":
        raise InputError(
            f"{where}: '{key}' must end with the assistant's turn, found {turns[-1].role}; fix "
            "the row."
        )
    if len(turns) > 1 and turns[0].role == "assistant":
        raise InputError(
            f"{where}: '{key}' has several turns, but a pair compares one answer; move the "
            "turns before the last one to the prompt."
        )
    turns = in_order(turns, where) if len(turns) > 1 else turns
    return turns[:-1], turns[-1]


def _same_conversation(row: Row, column: str, where: str, whole: tuple[Message, ...]) -> None:
    """Refuse a pair beside another conversation than its own."""
    turns = [m for m in conversation(row[column], where, empty_end=True) if m.role != "system"]
    spoken = tuple(m for m in whole if m.role != "system")
    if not any(same_turns(tuple(turns), part) for part in (spoken, spoken[:-1])):
        raise InputError(
            f"{where}: '{column}' differs from the pair's conversation; fix the row or remove "
            "the column."
        )


def chosen_after(ask: str | None) -> Reader:
    """A reader of pairs for SFT: the prompt and the chosen answer, which alone is trained on."""
    read = pair_after(ask)

    def chosen(row: Row, where: str) -> Record | Skipped:
        pair = read(row, where)
        return pair if isinstance(pair, Skipped) else _chosen(pair)

    return chosen


def _chosen(pair: Record) -> Record:
    _said(pair.chosen, "chosen", pair.where)
    return pair.answered()


def _said(answer: str | None, key: str, where: str) -> Message:
    return Message("assistant", text_of({key: answer}, key, where))
