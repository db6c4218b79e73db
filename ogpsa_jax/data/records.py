"""Records: what a data set holds once its format is forgotten, and where each row came from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ogpsa_jax.errors import InputError

Kind = Literal["sft", "preference"]


@dataclass(frozen=True)
class DataSource:
    """A file, a folder or a hub id, and which rows of it.

    Attributes:
      path: JSON, JSON Lines, Parquet, CSV or text file, a folder of such files, or a hub id.
      split: name of the split, and a slice of its rows as in ``train[:2000]`` or ``train[90%:]``.
      format: ``auto`` or one of the names in :mod:`ogpsa_jax.data.formats`.
      weight: rows of this source for every ``weight`` rows of the first one.
      samples: number of rows, drawn without replacement by the run's seed; None takes all.
    """

    path: str
    split: str = "train"
    format: str = "auto"
    weight: float = 1.0
    samples: int | None = None


@dataclass(frozen=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A row, with where it stands (``file, line 3``).

    Exactly one of these is set: `text`; `messages`, which end with an assistant's; or `messages`,
    which end with a user's, together with `chosen` and `rejected`.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None

    @property
    def prompt(self) -> str:
        """All that is given, as one text: rows with the same prompt belong to the same split."""
        given = self.messages if self.chosen is not None else self.messages[:-1]
        return self.text or "\n".join(f"{m.role}: {m.content}" for m in given)


Row = Mapping[str, Any]
Reader = Callable[[Row, str], Record | None]


def text_of(row: Row, key: str, where: str, *, empty: bool = False) -> str:
    """The text in a column.

    Raises:
      InputError: the column is missing, is not text, or is empty where it may not be.
    """
    value = row.get(key)
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise InputError(f"{where}: '{key}' must be text, found {found}; mend or remove the row.")
    if not empty and not value.strip():
        raise InputError(f"{where}: '{key}' is empty; fill it in or remove the row.")
    return value


def conversation(turns: Any, where: str, role_key: str, text_key: str) -> tuple[Message, ...]:
    """Messages out of a list of turns, whatever its keys are called.

    Raises:
      InputError: not a list of turns, an unknown role, or a turn out of order.
    """
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{where}: expected a list of turns, found {type(turns).__name__}.")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise InputError(f"{where}: a turn must hold '{role_key}' and '{text_key}'.")
        named = text_of(turn, role_key, where)
        role = _ROLES.get(named)
        if role is None:
            raise InputError(
                f"{where}: unknown role {named!r}; expected one of {', '.join(_ROLES)}."
            )
        messages.append(Message(role, text_of(turn, text_key, where, empty=role == "system")))
    spoken = [m.role for m in messages if m.role != "system"]
    expected = ["user", "assistant"] * len(spoken)
    if spoken != expected[: len(spoken)] or any(m.role == "system" for m in messages[1:]):
        raise InputError(
            f"{where}: turns must alternate user, assistant, after at most one system message; "
            f"found {', '.join(m.role for m in messages)}."
        )
    return tuple(m for m in messages if m.content or m.role != "system")


_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
