"""Conversations from lists of turns and from transcripts; which of their turns are trained on."""

import re
from collections.abc import Mapping
from typing import Any

from ogpsa_jax.data.records import Message, text_of
from ogpsa_jax.errors import InputError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
# How data sets say of a turn whether it is trained on: OpenAI and SlimOrca; ms-swift; axolotl.
FLAGS = ("weight", "loss", "train", "training", "trainable", "loss_mask")
_HUMAN = re.compile(r"\s*Human:")
_ASKED = re.compile(r"\n\nAssistant:\s*$")


def conversation(turns: Any, where: str, *, empty_end: bool = False) -> tuple[Message, ...]:
    """Messages that alternate between user and assistant, out of a list of turns.

    Args:
      turns: what the row contains: ``{role, content}`` or ``{from, value}`` each.
      where: of the row, for the message.
      empty_end: whether the last turn may be empty.

    Raises:
      InputError: not a list of turns, an unknown role, or a turn out of order.
    """
    return in_order(parse_turns(turns, where, empty_end=empty_end), where)


def parse_turns(turns: Any, where: str, *, empty_end: bool = False) -> tuple[Message, ...]:
    """Messages out of a list of turns, in whatever order; see :func:`conversation`."""
    if not isinstance(turns, list) or not turns:
        found = "nothing" if turns is None else "an empty list" if turns == [] else type(turns)
        found = found if isinstance(found, str) else found.__name__
        raise InputError(f"{where}: expected a list of turns, found {found}; fix the row.")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise InputError(
                f"{where}: turn {number} must have 'role' and 'content', or 'from' and 'value', "
                f"found {type(turn).__name__}; fix the row."
            )
        last = number == len(turns)
        messages.append(parse_turn(turn, f"{where}, turn {number}", empty=empty_end and last))
    return tuple(messages)


def parse_turn(turn: Mapping[str, Any], where: str, *, empty: bool = False) -> Message:
    """A message out of one turn; `empty` allows it to say nothing.

    Raises:
      InputError: an unknown role, no text, or a flag that is neither 0 nor 1.
    """
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    other = "content" if text_key == "value" else "value"
    if turn.get(other) and turn[other] != turn.get(text_key):
        raise InputError(
            f"{where}: the turn has both '{text_key}' and '{other}', and they differ; keep one "
            "of them."
        )
    named = text_of(turn, role_key, where)
    role = ROLES.get(named)
    if role is None:
        raise InputError(
            f"{where}: unknown role {named!r}; expected one of {', '.join(ROLES)}; fix or remove "
            "the row."
        )
    if turn.get("refusal"):  # OpenAI's: what the assistant says instead of the content
        if turn.get(text_key):
            raise InputError(
                f"{where}: the turn has both '{text_key}' and 'refusal'; keep one of them."
            )
        text_key = "refusal"
    said = text_of(turn, text_key, where, empty=empty or role == "system")
    trained = [_flag(turn, key, where) for key in FLAGS]
    return Message(role, said, all(trained) or role != "assistant")


def in_order(messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The messages, without an empty system message.

    Raises:
      InputError: they do not alternate user, assistant, after at most one system message.
    """
    spoken = [m.role for m in messages if m.role != "system"]
    expected = ["user", "assistant"] * len(spoken)
    if (
        not spoken
        or spoken != expected[: len(spoken)]
        or "system" in [m.role for m in messages[1:]]
    ):
        raise InputError(
            f"{where}: turns must alternate user, assistant, after at most one system message; "
            f"found {', '.join(m.role for m in messages)}; fix or remove the row."
        )
    return tuple(m for m in messages if m.content or m.role != "system")


def same_turns(first: tuple[Message, ...], second: tuple[Message, ...]) -> bool:
    """Whether the texts are equal, whatever part of them is trained on."""
    return [(m.role, m.content) for m in first] == [(m.role, m.content) for m in second]


def is_transcript(value: Any, *, answered: bool) -> bool:
    r"""Whether a text is an HH transcript: ``\n\nHuman: … \n\nAssistant: …``.

    `answered`: whether it contains the assistant's last answer or ends where that begins.
    """
    if not isinstance(value, str) or not _HUMAN.match(value):
        return False
    return "\n\nAssistant:" in value if answered else bool(_ASKED.search(value))


def transcript(text: str, where: str, key: str, *, answered: bool = True) -> tuple[Message, ...]:
    """The turns of an HH transcript.

    Args:
      text: the transcript.
      where: of the row, for the message.
      key: of the column, for the message.
      answered: False for a transcript that ends with ``Assistant:`` and no answer.

    Raises:
      InputError: it is none.
    """
    text = text if answered else _ASKED.sub("", text)
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        if turns and turns[-1]["role"] == roles[speaker]:  # the data set has such: one long turn
            turns[-1]["content"] += "\n\n" + said.strip()
        else:
            turns.append({"role": roles[speaker], "content": said.strip()})
    last = "assistant" if answered else "user"
    if parts[0].strip() or not turns or turns[-1]["role"] != last:
        raise InputError(
            f"{where}: '{key}' must be a transcript of 'Human:' and 'Assistant:' turns that ends "
            f"with the {last}'s; fix or remove the row."
        )
    return conversation(turns, where, empty_end=answered)


def _flag(turn: Mapping[str, Any], key: str, where: str) -> bool:
    value = turn.get(key)
    if value is None:
        return True
    if value not in (0, 1) or isinstance(value, str):
        raise InputError(
            f"{where}: '{key}' must be 1 (trained on) or 0 (context), found {value!r}; fix the row."
        )
    return bool(value)
