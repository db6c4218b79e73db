"""Records: the rows of a data set, whatever their format, and where each one came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ogpsa_jax.errors import InputError

Kind = Literal["sft", "preference"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class DataSource:
    """Where rows come from: a file, a folder or a hub id, and which of its rows.

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
      trained: False for an assistant's turn that is only context to the turns after it.
    """

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Record:
    """A row and its place (``file, line 3``).

    Exactly one of these is set: `text`; `messages`, which end with an assistant's; `messages`,
    which end with a user's, together with `chosen` and `rejected`; or such `messages` alone, a
    prompt without an answer.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    chosen: str | None = None
    rejected: str | None = None

    @property
    def prompt(self) -> str:
        """The whole prompt as one text: rows with the same prompt belong to the same split."""
        given = self.messages[:-1] if self._answered else self.messages
        return self.text or "\n".join(f"{m.role}: {m.content}" for m in given)

    @property
    def _answered(self) -> bool:
        return bool(self.messages) and self.messages[-1].role == "assistant"

    @property
    def prompt_alone(self) -> bool:
        """Whether there is a prompt and no answer to it."""
        return self.text is None and self.chosen is None and not self._answered

    @property
    def flaw(self) -> str:
        """Why a pair cannot be trained on; empty if it can."""
        if self.chosen is None or self.rejected is None:
            return ""
        if self.chosen.strip() == self.rejected.strip():
            return "chosen and rejected are equal"
        for name, answer in (("chosen", self.chosen), ("rejected", self.rejected)):
            if not answer.strip():
                return f"the {name} answer is empty"
        return ""

    def answered(self) -> "Record":
        """A pair as the conversation that ends with its chosen answer, the only turn trained on."""
        if self.chosen is None:
            return self
        return Record(self.where, (*as_context(self.messages), Message("assistant", self.chosen)))


@dataclass(frozen=True)
class Skipped:
    """A row that says that it does not count, and how it says so."""

    reason: str


def as_context(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Turns of which nothing is trained on."""
    return tuple(replace(m, trained=False) if m.role == "assistant" else m for m in messages)


def without_answer(record: Record) -> Record:
    """The prompt of a row alone.

    Raises:
      InputError: plain text, of which no part is a prompt.
    """
    if record.text is not None:
        raise InputError(
            f"{record.where}: plain text has no prompt that the model could answer; give prompts, "
            "or set references.answers to given."
        )
    given = record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages
    return Record(record.where, given)


def text_of(row: Row, key: str, where: str, *, empty: bool = False) -> str:
    """The text in a column.

    Raises:
      InputError: the column is missing, is not text, or is empty where it may not be.
    """
    value = row.get(key)
    if not isinstance(value, str):
        found = "nothing" if value is None else type(value).__name__
        raise InputError(f"{where}: '{key}' must be text, found {found}; fix or remove the row.")
    if not empty and not value.strip():
        raise InputError(f"{where}: '{key}' is empty; fill it in or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell but nobody can encode
        raise InputError(
            f"{where}: '{key}' has half a surrogate pair, which is not text; fix or remove the row."
        ) from None
    return value
