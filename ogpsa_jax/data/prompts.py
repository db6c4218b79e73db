"""Rows with a prompt and no answer: they suffice if the initial model gives the target."""

from collections.abc import Mapping
from typing import Any

from ogpsa_jax.data.fields import SYSTEM
from ogpsa_jax.data.formats import Format
from ogpsa_jax.data.pairs import TURNS
from ogpsa_jax.data.readers import PAIRS, given_turns, with_system
from ogpsa_jax.data.records import Record, Row
from ogpsa_jax.data.turns import ROLES, conversation

REMEDY = (
    "as reference rows, prompts alone go with ogpsa.preset: recommended, references.target: "
    "initial or references.answers: own"
)
# Where the formats keep answers, or text that is no prompt.
_ANSWERS = (
    *("output", "completion", "response", "answer", "chatgpt_response"),
    *("response_0", "response_1", "text", *(column for pair in PAIRS for column in pair)),
)
_ASKS = ("instruction", "prompt", "question", "query", "user_query", "input")


def _holds(row: Row, column: str) -> bool:
    return row.get(column) is not None


def asks_alone(row: Row) -> bool:
    """Whether a row has a prompt and no answer.

    That is so if every column in which a format keeps its answers is missing or null, and there is
    a list of turns that ends with the user's, or no such list and a prompt.
    """
    if any(_holds(row, column) for column in _ANSWERS):
        return False
    for column in TURNS:
        if _holds(row, column):
            turns: Any = row[column]
            last = turns[-1] if isinstance(turns, list) and turns else None
            role = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
            return ROLES.get(str(role)) == "user"
    return any(_holds(row, column) for column in _ASKS)


def prompt_alone(row: Row, where: str) -> Record:
    """The record of such a row.

    Raises:
      InputError: the prompt is malformed.
    """
    column = next((column for column in TURNS if _holds(row, column)), None)
    if column is not None:
        return Record(where, with_system(row, where, conversation(row[column], where)))
    ask = next(column for column in _ASKS if _holds(row, column))
    return Record(where, given_turns(row, ask, where))


PROMPT_ALONE = Format(
    "prompt",
    frozenset((*SYSTEM, *TURNS, *_ASKS, *_ANSWERS, "history", "context")),
    asks_alone,
    prompt_alone,
)
