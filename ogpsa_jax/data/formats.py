"""The formats of safety and instruction data, recognised by their columns.

What a row says of its answer in columns that are no format's own, and which columns are ignored, is
in :mod:`ogpsa_jax.data.fields`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ogpsa_jax.data.fields import SYSTEM
from ogpsa_jax.data.pairs import TURNS, chosen_after, pair_after, pku_saferlhf, pku_saferlhf_sft
from ogpsa_jax.data.readers import PAIRS, Reader, ask_and_answer, halueval, text, turns_in
from ogpsa_jax.data.records import Kind, Row
from ogpsa_jax.data.turns import ROLES
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
        turns = row.get(column)
        last = turns[-1] if isinstance(turns, list) and turns else None
        role = last.get("role", last.get("from")) if isinstance(last, Mapping) else None
        return column in row and not (_is_pair(row) and ROLES.get(str(role)) == "user")

    return recognised


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
