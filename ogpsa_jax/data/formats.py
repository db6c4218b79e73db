"""The formats of safety and instruction data, recognised by their columns.

Each reader turns one row into a record, or into None where the format itself says that the row does
not count (HaluEval's hallucinated answers, PKU-SafeRLHF's questions without a safe answer). Answers
of a pair may come out empty: :func:`ogpsa_jax.data.prepare` names such pairs and leaves them out.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from ogpsa_jax.data.records import Kind, Message, Record, Row, conversation, text_of
from ogpsa_jax.errors import InputError

Reader = Callable[[Row, str], Record | None]


def _given(row: Row, where: str) -> tuple[Message, ...]:
    """The given part of a row whose answer stands elsewhere; it ends with a user's turn."""
    if isinstance(row.get("prompt"), list):
        turns = conversation(row["prompt"], where, "role", "content")
    elif "conversations" in row:
        turns = conversation(row["conversations"], where, "from", "value")
    else:
        asked = text_of(row, "prompt" if "prompt" in row else "instruction", where)
        if row.get("input"):
            asked += "\n" + text_of(row, "input", where, empty=True)
        turns = (*_history(row.get("history"), where), Message("user", asked))
    if turns[-1].role != "user":
        raise InputError(
            f"{where}: what precedes the answer must end with a user's turn; mend the row."
        )
    return _with_system(row, where, turns)


def _history(history: Any, where: str) -> tuple[Message, ...]:
    """Earlier rounds of an alpaca row: ``[[question, answer], ...]``."""
    if not history:
        return ()
    rounds = history if isinstance(history, list) else [None]
    turns = []
    for pair in rounds:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(
                f"{where}: 'history' must be a list of [question, answer] pairs; mend the row."
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return conversation(turns, where, "role", "content")


def _with_system(row: Row, where: str, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns, led by the row's system message where it has one of its own."""
    if not row.get("system") or turns[0].role == "system":
        return turns
    return (Message("system", text_of(row, "system", where)), *turns)


def _answered(where: str, given: tuple[Message, ...], answer: str) -> Record:
    return Record(where, (*given, Message("assistant", answer)))


def _ended(row: Row, where: str, turns: tuple[Message, ...]) -> Record:
    if turns[-1].role != "assistant":
        raise InputError(f"{where}: the last turn must be the assistant's; mend the row.")
    return Record(where, _with_system(row, where, turns))


def _answer(row: Row, key: str, where: str, *, empty: bool = False) -> str:
    """The assistant's text out of a text, a message, or the last of several messages."""
    value = row.get(key)
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        role_key, text_key = ("role", "content") if "content" in value else ("from", "value")
        role = value.get(role_key, "assistant")
        if role not in ("assistant", "gpt", "model"):
            raise InputError(
                f"{where}: '{key}' must end with the assistant's turn, found {role}; mend the row."
            )
        return text_of({key: value.get(text_key)}, key, where, empty=empty)
    return text_of({key: value}, key, where, empty=empty)


def alpaca(row: Row, where: str) -> Record:
    """``{instruction, input?, output, system?, history?}``."""
    return _answered(where, _given(row, where), text_of(row, "output", where))


def prompt_completion(row: Row, where: str) -> Record:
    """``{prompt, completion}`` or ``{prompt, response}``, texts or messages."""
    key = "completion" if "completion" in row else "response"
    return _answered(where, _given(row, where), _answer(row, key, where))


def question_answer(row: Row, where: str) -> Record:
    """``{question, answer}``, as GSM8K."""
    question = Message("user", text_of(row, "question", where))
    return _answered(where, (question,), text_of(row, "answer", where))


def sharegpt(row: Row, where: str) -> Record:
    """``{conversations: [{from, value}], system?}``."""
    return _ended(row, where, conversation(row.get("conversations"), where, "from", "value"))


def messages(row: Row, where: str) -> Record:
    """``{messages: [{role, content}]}``."""
    return _ended(row, where, conversation(row.get("messages"), where, "role", "content"))


def text(row: Row, where: str) -> Record:
    """``{text}``: learnt from its first token to its end."""
    return Record(where, text=text_of(row, "text", where))


def halueval(row: Row, where: str) -> Record | None:
    """HaluEval general data ``{user_query, chatgpt_response, hallucination}``; keeps "no"."""
    verdict = row.get("hallucination")
    if verdict not in ("yes", "no"):
        raise InputError(
            f"{where}: 'hallucination' must be yes or no, found {verdict!r}; mend the row."
        )
    if verdict == "yes":
        return None
    query = Message("user", text_of(row, "user_query", where))
    return _answered(where, (query,), text_of(row, "chatgpt_response", where))


def pku_saferlhf(row: Row, where: str) -> Record | None:
    """PKU-SafeRLHF pairs: ``response: [safe, unsafe]``, or the published columns.

    Of the published rows those count that hold one safe answer and one unsafe one.
    """
    given = (Message("user", text_of(row, "prompt", where)),)
    if "response" in row:
        pair = row["response"]
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(f"{where}: 'response' must be a pair [safe, unsafe]; mend the row.")
        safe, unsafe = (text_of({"response": said}, "response", where, empty=True) for said in pair)
        return Record(where, given, chosen=safe, rejected=unsafe)
    answers, is_safe = _published_answers(row, where)
    if is_safe[0] == is_safe[1]:
        return None
    chosen = is_safe.index(True)
    return Record(where, given, chosen=answers[chosen], rejected=answers[1 - chosen])


def pku_saferlhf_sft(row: Row, where: str) -> Record | None:
    """PKU-SafeRLHF for SFT: the safe answer, of two safe ones the better; None where none is."""
    given = (Message("user", text_of(row, "prompt", where)),)
    if "response" in row:
        pair = pku_saferlhf(row, where)
        answer = pair.chosen if pair is not None else None
    else:
        answers, is_safe = _published_answers(row, where)
        if not any(is_safe):
            return None
        best = _choice(row, "better_response_id", where) if all(is_safe) else is_safe.index(True)
        answer = answers[best]
    return _answered(where, given, text_of({"response": answer}, "response", where))


def _published_answers(row: Row, where: str) -> tuple[list[str], list[bool]]:
    answers = [text_of(row, f"response_{i}", where, empty=True) for i in (0, 1)]
    return answers, [_flag(row, f"is_response_{i}_safe", where) for i in (0, 1)]


def _flag(row: Row, key: str, where: str) -> bool:
    value = {"true": True, "false": False}.get(str(row.get(key)).lower())  # CSV holds text
    if value is None:
        raise InputError(
            f"{where}: '{key}' must be true or false, found {row.get(key)!r}; mend the row."
        )
    return value


def _choice(row: Row, key: str, where: str) -> int:
    if str(row.get(key)) not in ("0", "1"):
        raise InputError(f"{where}: '{key}' must be 0 or 1, found {row.get(key)!r}; mend the row.")
    return int(row[key])


def preference(row: Row, where: str) -> Record:
    """``{prompt | instruction | conversations, chosen, rejected}``, UltraFeedback, ShareGPT pairs.

    Chosen and rejected are texts, messages, or whole conversations with the prompt in them.
    """
    answers = [_answer(row, key, where, empty=True) for key in ("chosen", "rejected")]
    if isinstance(row["chosen"], list) and len(row["chosen"]) > 1:
        given, other = (
            conversation(row[key], where, "role", "content", empty_end=True)[:-1]
            if isinstance(row[key], list)
            else ()
            for key in ("chosen", "rejected")
        )
        _same_prompt(given, other, where)
        if given[-1].role != "user":
            raise InputError(
                f"{where}: 'chosen' must end with a user's turn and the answer; mend the row."
            )
        given = _with_system(row, where, given)
    else:
        given = _given(row, where)
    return Record(where, given, chosen=answers[0], rejected=answers[1])


def hh_rlhf(row: Row, where: str) -> Record:
    r"""HH-RLHF: transcripts ``\n\nHuman: … \n\nAssistant: …`` that differ in the last answer."""
    chosen, rejected = (
        _transcript(text_of(row, key, where), where, key) for key in ("chosen", "rejected")
    )
    _same_prompt(chosen[:-1], rejected[:-1], where)
    return Record(where, chosen[:-1], chosen=chosen[-1].content, rejected=rejected[-1].content)


def _same_prompt(first: tuple[Message, ...], second: tuple[Message, ...], where: str) -> None:
    if first != second:
        raise InputError(
            f"{where}: 'chosen' and 'rejected' answer different prompts; mend or remove the row."
        )


def _transcript(transcript: str, where: str, key: str) -> tuple[Message, ...]:
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + transcript.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns: list[dict[str, str]] = []
    for speaker, said in zip(parts[1::2], parts[2::2], strict=True):
        if turns and turns[-1]["role"] == roles[speaker]:  # the data set has such: one long turn
            turns[-1]["content"] += "\n\n" + said.strip()
        else:
            turns.append({"role": roles[speaker], "content": said.strip()})
    if parts[0].strip() or not turns or turns[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: '{key}' must be a transcript of 'Human:' and 'Assistant:' turns that ends "
            "with the assistant's; mend or remove the row."
        )
    return conversation(turns, where, "role", "content", empty_end=True)


def chosen_answer(row: Row, where: str) -> Record:
    """A pair read for SFT: the prompt and the chosen answer."""
    pair = (hh_rlhf if _is_hh_rlhf(row) else preference)(row, where)
    return _answered(where, pair.messages, text_of({"chosen": pair.chosen}, "chosen", where))


def _is_hh_rlhf(row: Row) -> bool:
    return not {"prompt", "instruction", "conversations"} & set(row) and isinstance(
        row.get("chosen"), str
    )


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: set(columns) <= set(row)


def _is_pku_saferlhf(row: Row) -> bool:
    published = {"prompt", "response_0", "response_1", "is_response_0_safe"} <= set(row)
    return published or ("prompt" in row and isinstance(row.get("response"), list))


# Name, how to recognise its rows, reader; the most particular first.
_SFT: tuple[tuple[str, Callable[[Row], bool], Reader], ...] = (
    ("halueval", _has("user_query", "chatgpt_response", "hallucination"), halueval),
    ("pku_saferlhf", _is_pku_saferlhf, pku_saferlhf_sft),
    ("messages", _has("messages"), messages),
    ("alpaca", _has("instruction", "output"), alpaca),
    ("prompt_completion", _has("prompt", "completion"), prompt_completion),
    ("prompt_completion", _has("prompt", "response"), prompt_completion),
    ("question_answer", _has("question", "answer"), question_answer),
    ("preference", _has("chosen", "rejected"), chosen_answer),
    ("hh_rlhf", _has("chosen", "rejected"), chosen_answer),
    ("sharegpt", _has("conversations"), sharegpt),
    ("text", _has("text"), text),
)
_PREFERENCE: tuple[tuple[str, Callable[[Row], bool], Reader], ...] = (
    ("pku_saferlhf", _is_pku_saferlhf, pku_saferlhf),
    ("hh_rlhf", lambda row: _has("chosen", "rejected")(row) and _is_hh_rlhf(row), hh_rlhf),
    ("preference", _has("chosen", "rejected"), preference),
)
FORMATS = {"sft": _SFT, "preference": _PREFERENCE}


def reader_for(rows: Sequence[Row], kind: Kind, name: str, where: str) -> Reader:
    """The reader of a data set, from its format's name or its first row's columns.

    Raises:
      InputError: an unknown name, or columns that no format has.
    """
    names = ", ".join(dict.fromkeys(entry[0] for entry in FORMATS[kind]))
    if name != "auto":
        for known, _, reader in FORMATS[kind]:
            if known == name:
                return reader
        raise InputError(f"{where}: unknown {kind} format {name!r}; known: {names}.")
    first = rows[0] if rows else {}
    for _, recognised, reader in FORMATS[kind]:
        if recognised(first):
            return reader
    raise InputError(
        f"{where}: no {kind} format has the columns {', '.join(map(str, first))}; known formats: "
        f"{names}."
    )
