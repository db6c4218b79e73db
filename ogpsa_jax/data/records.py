"""Records: what a data set holds once its format is forgotten, and where each row came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ogpsa_jax.errors import InputError

Kind = Literal["sft", "preference"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class DataSource:
    """A file, a folder or a hub id, and which rows of it.

    Attributes:
      path: JSON, JSON Lines, Parquet, CSV or text file, a folder of such files or as written by
        ``datasets.save_to_disk``, or a hub id, perhaps with a subset (``owner/name:subset``).
      split: name of the split, perhaps with a slice: ``train[:2000]``, ``train[-200:]`` count rows;
        ``train[:90%]``, ``train[90%:]`` count *prompts*, so that the rows of one prompt are never
        on both sides.
      format: ``auto`` or one of the names in :mod:`ogpsa_jax.data.formats`.
      weight: 1 for all sources (the default): each row once an epoch. Otherwise the proportions in
        which the sources are mixed, 0.8 and 0.2 for a fifth of the second; see
        :class:`ogpsa_jax.data.TrainBatches`.
      samples: number of rows, drawn without replacement by the run's seed; None takes all.
    """

    path: str
    split: str = "train"
    format: str = "auto"
    weight: float = 1.0
    samples: int | None = None


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
      role: system, user or assistant.
      content: what is said.
      learnt: False for an assistant's turn that is only context to the turns after it.
    """

    role: str
    content: str
    learnt: bool = True


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

    @property
    def flaw(self) -> str:
        """Why a pair teaches nothing; empty if it does teach something."""
        if self.chosen is None or self.rejected is None:
            return ""
        if self.chosen.strip() == self.rejected.strip():
            return "chosen and rejected are equal"
        for name, answer in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not answer.strip():
                return f"the {name} answer is empty"
        return ""

    def answered(self) -> "Record":
        """A pair as the conversation that ends with its chosen answer."""
        if self.chosen is None:
            return self
        return Record(self.where, (*self.messages, Message("assistant", self.chosen)))


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
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell but nobody can encode
        raise InputError(
            f"{where}: '{key}' holds half a surrogate pair, which is no text; mend or remove the "
            "row."
        ) from None
    return value


def conversation(
    turns: Any, where: str, role_key: str, text_key: str, *, empty_end: bool = False
) -> tuple[Message, ...]:
    """Messages out of a list of turns, whatever its keys are called.

    Args:
      turns: what the row holds.
      where: of the row, for the message.
      role_key: the key of the speaker.
      text_key: the key of what is said.
      empty_end: whether the last turn may be empty.

    Raises:
      InputError: not a list of turns, an unknown role, or a turn out of order.
    """
    if not isinstance(turns, list) or not turns:
        found = "nothing" if turns is None else "an empty list" if turns == [] else type(turns)
        found = found if isinstance(found, str) else found.__name__
        raise InputError(f"{where}: expected a list of turns, found {found}; mend the row.")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise InputError(
                f"{where}: turn {number} must hold '{role_key}' and '{text_key}', found "
                f"{type(turn).__name__}; mend the row."
            )
        named = text_of(turn, role_key, f"{where}, turn {number}")
        role = _ROLES.get(named)
        if role is None:
            raise InputError(
                f"{where}, turn {number}: unknown role {named!r}; expected one of "
                f"{', '.join(_ROLES)}; mend or remove the row."
            )
        may_be_empty = role == "system" or (empty_end and number == len(turns))
        said = text_of(turn, text_key, f"{where}, turn {number}", empty=may_be_empty)
        messages.append(Message(role, said))
    spoken = [m.role for m in messages if m.role != "system"]
    expected = ["user", "assistant"] * len(spoken)
    if (
        not spoken
        or spoken != expected[: len(spoken)]
        or "system" in [m.role for m in messages[1:]]
    ):
        raise InputError(
            f"{where}: turns must alternate user, assistant, after at most one system message; "
            f"found {', '.join(m.role for m in messages)}; mend or remove the row."
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
