"""The formats of safety and instruction data, recognised by their columns.

Each reader turns one row into a record, or into None where the format itself says that the row does
not count (HaluEval's hallucinated answers).
"""

import re
from collections.abc import Sequence

from ogpsa_jax.data.records import Kind, Message, Reader, Record, Row, conversation, text_of
from ogpsa_jax.errors import InputError


def _messages_of_prompt(row: Row, where: str) -> tuple[Message, ...]:
    """The given part of a row whose answer stands elsewhere."""
    if isinstance(row.get("prompt"), list):
        return conversation(row["prompt"], where, "role", "content")
    if "conversations" in row:
        return conversation(row["conversations"], where, "from", "value")
    key = "prompt" if "prompt" in row else "instruction"
    asked = text_of(row, key, where)
    if row.get("input"):
        asked += "\n" + text_of(row, "input", where)
    system = [Message("system", row["system"])] if row.get("system") else []
    history = [
        Message(role, text)
        for turn in row.get("history") or []
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return (*system, *history, Message("user", asked))


def _answered(row: Row, where: str, messages: tuple[Message, ...], answer: str) -> Record:
    return Record(where, (*messages, Message("assistant", answer)))


def alpaca(row: Row, where: str) -> Record:
    """``{instruction, input?, output, system?, history?}``."""
    return _answered(row, where, _messages_of_prompt(row, where), text_of(row, "output", where))


def prompt_completion(row: Row, where: str) -> Record:
    """``{prompt, completion}``, texts or messages."""
    answer = row.get("completion")
    if isinstance(answer, list):
        answer = conversation_answer(answer, where)
    else:
        answer = text_of(row, "completion", where)
    return _answered(row, where, _messages_of_prompt(row, where), answer)


def conversation_answer(value: object, where: str) -> str:
    """The assistant's text out of a message, the last of several messages, or a text."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        key = "content" if "content" in value else "value"
        return text_of(value, key, where)
    if isinstance(value, str) and value.strip():
        return value
    raise InputError(f"{where}: the answer is empty or no text; mend or remove the row.")


def sharegpt(row: Row, where: str) -> Record:
    """``{conversations: [{from, value}]}``."""
    return _ended(Record(where, conversation(row["conversations"], where, "from", "value")))


def messages(row: Row, where: str) -> Record:
    """``{messages: [{role, content}]}``."""
    return _ended(Record(where, conversation(row["messages"], where, "role", "content")))


def _ended(record: Record) -> Record:
    if record.messages[-1].role != "assistant":
        raise InputError(f"{record.where}: the last turn must be the assistant's.")
    return record


def text(row: Row, where: str) -> Record:
    """``{text}``: learnt from its first token to its end."""
    return Record(where, text=text_of(row, "text", where))


def halueval(row: Row, where: str) -> Record | None:
    """HaluEval general data ``{user_query, chatgpt_response, hallucination}``; keeps "no"."""
    if row.get("hallucination") != "no":
        return None
    query = Message("user", text_of(row, "user_query", where))
    return _answered(row, where, (query,), text_of(row, "chatgpt_response", where))


def question_answer(row: Row, where: str) -> Record:
    """``{question, answer}``, as GSM8K."""
    question = Message("user", text_of(row, "question", where))
    return _answered(row, where, (question,), text_of(row, "answer", where))


def _saferlhf_pair(row: Row, where: str) -> Record | None:
    """PKU-SafeRLHF, either layout, as (safe or safer, the other); None where neither is safe."""
    asked = (Message("user", text_of(row, "prompt", where)),)
    if "response" in row:
        answers = row["response"]
        if not isinstance(answers, list) or len(answers) != 2:
            raise InputError(f"{where}: 'response' must be a pair [safe, unsafe].")
        safe, unsafe = (conversation_answer(answer, where) for answer in answers)
        return Record(where, asked, chosen=safe, rejected=unsafe)
    safer = row.get("safer_response_id")
    if safer not in (0, 1):
        raise InputError(f"{where}: 'safer_response_id' must be 0 or 1, found {safer!r}.")
    if not row.get(f"is_response_{safer}_safe"):
        return None
    safe, unsafe = (
        text_of(row, f"response_{safer}", where),
        text_of(row, f"response_{1 - safer}", where),
    )
    return Record(where, asked, chosen=safe, rejected=unsafe)


def pku_saferlhf_sft(row: Row, where: str) -> Record | None:
    """PKU-SafeRLHF for SFT: the safe answer."""
    pair = _saferlhf_pair(row, where)
    if pair is None:
        return None
    return Record(where, (*pair.messages, Message("assistant", pair.chosen or "")))


def pku_saferlhf(row: Row, where: str) -> Record | None:
    """PKU-SafeRLHF pairs, ``response: [safe, unsafe]`` or the published columns."""
    return _saferlhf_pair(row, where)


def preference(row: Row, where: str) -> Record:
    """``{prompt | instruction | conversations, chosen, rejected}``, as UltraFeedback too."""
    chosen = conversation_answer(row.get("chosen"), where)
    rejected = conversation_answer(row.get("rejected"), where)
    if "prompt" not in row and "instruction" not in row and "conversations" not in row:
        turns = row["chosen"]
        if not isinstance(turns, list) or len(turns) < 2:
            raise InputError(f"{where}: no prompt, and 'chosen' holds no conversation.")
        given = conversation(turns[:-1], where, "role", "content")
    else:
        given = _messages_of_prompt(row, where)
    return Record(where, given, chosen=chosen, rejected=rejected)


def hh_rlhf(row: Row, where: str) -> Record:
    r"""HH-RLHF: transcripts ``\n\nHuman: … \n\nAssistant: …`` that differ in the last answer."""
    chosen, rejected = (
        _transcript(text_of(row, key, where), where) for key in ("chosen", "rejected")
    )
    return Record(where, chosen[:-1], chosen=chosen[-1].content, rejected=rejected[-1].content)


def _transcript(transcript: str, where: str) -> tuple[Message, ...]:
    parts = re.split(r"\n\n(Human|Assistant): ?", "\n\n" + transcript.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[role], "content": said.strip()}
        for role, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    found = conversation(turns, where, "role", "content")
    if found[-1].role != "assistant":
        raise InputError(f"{where}: the transcript must end with the assistant's answer.")
    return found


# (name, columns it needs, columns it must not have, reader), the most particular first.
_Entry = tuple[str, frozenset[str], Reader]
_SFT: tuple[_Entry, ...] = (
    ("halueval", frozenset({"user_query", "chatgpt_response", "hallucination"}), halueval),
    ("pku_saferlhf", frozenset({"prompt", "response_0", "safer_response_id"}), pku_saferlhf_sft),
    ("pku_saferlhf", frozenset({"prompt", "response"}), pku_saferlhf_sft),
    ("messages", frozenset({"messages"}), messages),
    ("alpaca", frozenset({"instruction", "output"}), alpaca),
    ("prompt_completion", frozenset({"prompt", "completion"}), prompt_completion),
    ("question_answer", frozenset({"question", "answer"}), question_answer),
    ("sharegpt", frozenset({"conversations"}), sharegpt),
    ("text", frozenset({"text"}), text),
)
_PREFERENCE: tuple[_Entry, ...] = (
    ("pku_saferlhf", frozenset({"prompt", "response_0", "safer_response_id"}), pku_saferlhf),
    ("pku_saferlhf", frozenset({"prompt", "response"}), pku_saferlhf),
    ("preference", frozenset({"prompt", "chosen", "rejected"}), preference),
    ("preference", frozenset({"instruction", "chosen", "rejected"}), preference),
    ("preference", frozenset({"conversations", "chosen", "rejected"}), preference),
    ("hh_rlhf", frozenset({"chosen", "rejected"}), hh_rlhf),
)
FORMATS: dict[str, tuple[_Entry, ...]] = {"sft": _SFT, "preference": _PREFERENCE}


def reader_for(rows: Sequence[Row], kind: Kind, name: str, where: str) -> Reader:
    """The reader of a data set, from its format's name or its first row's columns.

    Raises:
      InputError: an unknown name, or columns that no format has.
    """
    entries = FORMATS[kind]
    columns = frozenset(rows[0]) if rows else frozenset()
    if name != "auto":
        named = [entry for entry in entries if entry[0] == name]
        if not named:
            known = ", ".join(dict.fromkeys(entry[0] for entry in entries))
            raise InputError(f"{where}: unknown format {name!r} for {kind}; known: {known}.")
        return next((e[2] for e in named if e[1] <= columns), named[0][2])
    for _, needed, reader in entries:
        if needed <= columns:
            if reader is hh_rlhf and not isinstance(rows[0]["chosen"], str):
                return preference
            return reader
    known = "; ".join(f"{entry[0]}: {', '.join(sorted(entry[1]))}" for entry in entries)
    raise InputError(
        f"{where}: no {kind} format has the columns {', '.join(sorted(columns))}; known: {known}."
    )
