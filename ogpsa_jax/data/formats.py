"""The formats of safety and instruction data, recognised by their columns.

What a row says of its answer in columns that are no format's own, and which columns are ignored, is
in :mod:`ogpsa_jax.data.fields`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ogpsa_jax.data.fields import SYSTEM
from ogpsa_jax.data.pairs import TURNS, chosen_after, pair_after, pku_saferlhf, pku_saferlhf_sft
from ogpsa_jax.data.readers import (
    PAIRS,
    Reader,
    ask_and_answer,
    given_turns,
    halueval,
    text,
    turns_in,
    with_system,
)
from ogpsa_jax.data.records import Kind, Record, Row
from ogpsa_jax.data.turns import ROLES, conversation
from ogpsa_jax.errors import InputError

_ASKS = ("instruction", "prompt", "question", "query", "input")
_ANSWERS = ("output", "completion", "response", "answer")


@dataclass(frozen=True)
class Format:
    """A layout of rows.

    Attributes:
      name: as in the configuration.
      uses: the columns that it reads.
      recognised: whether a row is of this layout.
      read: a row as a record.
      pair: whether its rows contain two answers.
    """

    name: str
    uses: frozenset[str]
    recognised: Callable[[Row], bool]
    read: Reader
    pair: bool = False


def _is_pku_saferlhf(row: Row) -> bool:
    judged = {"is_response_0_safe", "safer_response_id", "better_response_id"} & set(row)
    published = judged and {"prompt", "response_0", "response_1"} <= set(row)
    answers = row.get("response")
    texts = isinstance(answers, list) and not any(isinstance(said, Mapping) for said in answers)
    return bool(published) or ("prompt" in row and texts)


def _is_pair(row: Row) -> bool:
    return any(set(pair) <= set(row) for pair in PAIRS)


def _has_pair_after(ask: str | None) -> Callable[[Row], bool]:
    return lambda row: _is_pair(row) and (ask is None or bool(row.get(ask)))


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: set(columns) <= set(row)


def _has_answered(column: str) -> Callable[[Row], bool]:
    """Conversations; without an answer at their end they are the prompt of a pair."""

    def recognised(row: Row) -> bool:
        return column in row and not (_is_pair(row) and _ends_asking(row[column]))

    return recognised


def _ends_asking(turns: object) -> bool:
    """Whether a list of turns ends with the user's."""
    last = turns[-1] if isinstance(turns, list) and turns else None
    role = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
    return ROLES.get(str(role)) == "user"


_SYSTEM = frozenset(SYSTEM)
_COMPARED = frozenset(key for pair in PAIRS for key in pair)  # with the answer
_PKU = _SYSTEM | {"prompt", "response", "response_0", "response_1", "is_response_0_safe"}
_PKU |= {"is_response_1_safe", "safer_response_id", "better_response_id"}


def _asking(name: str, ask: str, answer: str) -> Format:
    uses = _SYSTEM | _COMPARED | {ask, answer, "input", "history"}
    uses |= {"context"} if ask == "instruction" else set()
    return Format(name, uses, _has(ask, answer), ask_and_answer(ask, answer))


def _talking(name: str, column: str) -> Format:
    uses = _SYSTEM | _COMPARED | {column, "prompt"}
    return Format(name, uses, _has_answered(column), turns_in(column))


def _pairing(kind: Kind) -> tuple[Format, ...]:
    """Pairs, by the column of their prompt; without one it leads both answers."""
    found = []
    for ask in (*TURNS, *_ASKS, None):
        name = "hh_rlhf" if ask is None else "preference"
        uses = _SYSTEM | _COMPARED | {*TURNS} | ({"prompt"} if ask in (None, *TURNS) else set())
        uses |= {ask, "input", "history"} if ask is not None else set()
        uses |= {"context"} if ask == "instruction" else set()
        read = pair_after(ask) if kind == "preference" else chosen_after(ask)
        recognised = _has_pair_after(ask)
        found.append(Format(name, frozenset(uses), recognised, read, pair=True))
    return tuple(found)


_NAMES = {"instruction": "alpaca", "prompt": "prompt_completion"}  # others: question_answer

# The most particular first.
_SFT = (
    Format(
        "halueval",
        _SYSTEM | {"user_query", "chatgpt_response", "hallucination"},
        _has("user_query", "chatgpt_response", "hallucination"),
        halueval,
    ),
    Format("pku_saferlhf", _PKU, _is_pku_saferlhf, pku_saferlhf_sft, pair=True),
    _talking("messages", "messages"),
    _asking("alpaca", "instruction", "output"),
    *(_asking("prompt_completion", "prompt", answer) for answer in ("completion", "response")),
    _asking("question_answer", "question", "answer"),
    *(
        _asking(_NAMES.get(ask, "question_answer"), ask, answer)
        for ask in _ASKS
        for answer in _ANSWERS
    ),
    *_pairing("sft"),
    _talking("sharegpt", "conversations"),
    Format("text", frozenset({"text"}), _has("text"), text),
)
_PREFERENCE = (
    Format("pku_saferlhf", _PKU, _is_pku_saferlhf, pku_saferlhf, pair=True),
    *_pairing("preference"),
)
FORMATS: dict[Kind, tuple[Format, ...]] = {"sft": _SFT, "preference": _PREFERENCE}


def format_of(rows: Sequence[Row], kind: Kind, name: str, where: str) -> Format:
    """The format of a data set, from its name or its first row's columns.

    Raises:
      InputError: an unknown name, or columns that no format has.
    """
    names = ", ".join(dict.fromkeys(known.name for known in FORMATS[kind]))
    first = rows[0] if rows else {}
    named = [known for known in FORMATS[kind] if name in ("auto", known.name)]
    if not named:
        raise InputError(f"{where}: unknown {kind} format {name!r}; known: {names}.")
    for known in named:
        if known.recognised(first):
            return known
    if name != "auto":
        return named[0]
    raise InputError(
        f"{where}: no {kind} format has the columns {', '.join(map(str, first))}; known formats: "
        f"{names}."
    )


# Rows with a prompt and no answer: they suffice if the initial model gives the target.
REMEDY = (
    "as reference rows, prompts alone go with ogpsa.preset: recommended, references.target: "
    "initial or references.answers: own"
)
_PROMPTS = ("instruction", "prompt", "question", "query", "user_query", "input")
# Where the formats keep answers, or text that is no prompt.
_NO_PROMPTS = (*_ANSWERS, "chatgpt_response", "response_0", "response_1", "text", *_COMPARED)


def asks_alone(row: Row) -> bool:
    """Whether a row has a prompt and no answer.

    That is so if every column in which a format keeps its answers is missing or null, and there is
    a list of turns that ends with the user's, or no such list and a prompt.
    """
    if any(row.get(column) is not None for column in _NO_PROMPTS):
        return False
    turns = next((row[column] for column in TURNS if row.get(column) is not None), None)
    if turns is not None:
        return _ends_asking(turns)
    return any(row.get(column) is not None for column in _PROMPTS)


def _prompt_alone(row: Row, where: str) -> Record:
    column = next((column for column in TURNS if row.get(column) is not None), None)
    if column is not None:
        return Record(where, with_system(row, where, conversation(row[column], where)))
    ask = next(column for column in _PROMPTS if row.get(column) is not None)
    return Record(where, given_turns(row, ask, where))


PROMPT_ALONE = Format(
    "prompt",
    frozenset((*SYSTEM, *TURNS, *_PROMPTS, *_NO_PROMPTS, "history", "context")),
    asks_alone,
    _prompt_alone,
)
